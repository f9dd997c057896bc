"""Feature extractors: the network that was trained on digits, and any other of its kind."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from genjax import checks

# The files beside this one, with the SHA-256 of their bytes.
SHIPPED = {
    "digits": (
        "digits_features.npz",
        "eaefa6f8b5de3dd519a618c489f6f2f62daf4fdb8b1c656ebda1924323dc2b61",
    ),
}


class Extractor(NamedTuple):
    """What turns examples into features. name and sha256 (of the file of weights) go into records.

    `extract(x [n, *event]) -> [n, d]` is pure; `parameters` is the pytree that it depends on.
    `maps(y [n, h, w, c])`, of images in [-1, 1], lists what each convolution gives: the features of
    a perceptual distance.
    """

    name: str
    sha256: str
    parameters: Any
    extract: Callable[[Any], Float[Array, "n d"]]
    maps: Callable[[Float[Array, "n h w c"]], list[Array]] | None = None


def feature_extractor(
    name: str = "digits", *, path: str | Path | None = None, sha256: str | None = None
) -> Extractor:
    """Load a trained `FeatureNetwork` as an extractor of images' integer levels [n, h, w, c].

    "digits" comes with the package: 64 features of 8x8 images in 17 levels, from a classifier that
    `python -m experiments.features` trained on the training split and that reads 98.6% of the test
    split; their mean square over the training split is 1. With `path` the weights are those of a
    `features.npz` that this command wrote, for any image set, under the `name` given.

    Raises ValueError for an unknown name, for a file whose SHA-256 is not the one expected (our
    own, or `sha256` where it is given), and for one that holds no such network.

    >>> features = feature_extractor()
    >>> features.name
    'digits'
    """
    if path is None:
        checks.one_of("name", name, SHIPPED)
        file, sha256 = SHIPPED[name]
        path = Path(__file__).with_name(file)
    content = Path(path).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(f"{path} has the SHA-256 {found}, expected {sha256}: its weights differ")
    levels, shape, parameters = _read(Path(path), content)
    return Extractor(name, found, parameters, *_functions(levels, shape, parameters))


def _read(path: Path, content: bytes) -> tuple[int, tuple[int, ...], Any]:
    """Levels and shape of the images, and the weights; nothing is unpickled."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        levels = int(arrays.pop("levels"))
        shape = tuple(int(side) for side in arrays.pop("shape"))
        tree: dict[str, Any] = {"scale": arrays.pop("scale"), "params": {}}
        for name, array in arrays.items():
            _, layer, leaf = name.split("/")
            tree["params"].setdefault(layer, {})[leaf] = array
        assert {"convolutions_0", "hidden", "output"} <= tree["params"].keys(), "a layer is missing"
    except Exception as error:
        raise ValueError(f"{path} holds no feature network: {error!r}") from error
    return levels, shape, tree


def _functions(levels: int, shape: tuple[int, ...], parameters: Any) -> tuple[Any, Any]:
    """Features of images' levels, and maps of images in [-1, 1]."""
    from genjax.data import Scaling
    from genjax.networks.features import FeatureNetwork

    layers = parameters["params"]
    convolutions = [layers[f"convolutions_{i}"]["kernel"] for i in range(len(layers) - 2)]
    network = FeatureNetwork(
        classes=layers["output"]["kernel"].shape[1],
        width=layers["hidden"]["kernel"].shape[1],
        channels=tuple(kernel.shape[-1] for kernel in convolutions),
    )
    scaling, weights = Scaling(levels), {"params": layers}

    def extract(x: Any) -> Float[Array, "n d"]:
        checks.shape("x", x, (None, *shape))
        y = scaling.to_continuous(x)

        def one(image: Array) -> Array:
            return network.apply(weights, image[None], method="embed")[0] / parameters["scale"]

        return jax.lax.map(one, y, batch_size=1024)

    def maps(y: Array) -> list[Array]:
        checks.shape("y", y, (None, *shape))
        found: Any = network.apply(weights, y, method="maps")
        return found

    return extract, maps
