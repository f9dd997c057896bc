"""`load(name, split)`: arrays and a spec, the same for images on disk and for 2-D densities."""

import difflib
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from genjax import checks
from genjax.data.images import IMAGES, ImageRecords, known_to_tfds, open_images
from genjax.data.pipeline import check_arrays
from genjax.data.preparing import FOLDER
from genjax.data.scaling import Scaling
from genjax.data.synthetic import DENSITIES

# How many fixed samples a 2-D density has in each split.
DENSITY_SPLITS = {"train": 10_000, "test": 5_000}
KINDS = ("points", "images", "tokens")
IN_MEMORY_LIMIT = 4 * 2**30
_CHUNK = 8192


class DataSpec(NamedTuple):
    """What a model must know of its data.

    kind: "points", float32 [n, d]; "images", integers [n, height, width, channels] in
    0..levels-1; or "tokens", integers [n, length] in 0..levels-1, symbols without an order.
    shape: of one example. levels: number of grey levels of images, vocabulary size of tokens, None
    for points. classes: number of labels, None without.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    levels: int | None
    classes: int | None

    def scaling(self, low: float = -1.0, high: float = 1.0) -> Scaling | None:
        """The map of an image's levels onto [low, high); None for points and tokens.

        Points are numbers already, tokens have no order. Raises ValueError for an unknown kind and
        for images without levels.
        """
        checks.one_of("kind", self.kind, KINDS)
        if self.kind != "images":
            return None
        if self.levels is None:
            raise ValueError(f"images must have levels, got levels=None for {self.name!r}")
        return Scaling(self.levels, low, high)


def load(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
    in_memory: bool | None = None,
    image_size: int | None = None,
    grey: bool = False,
    unreadable: str = "refuse",
) -> tuple[Any, DataSpec]:
    """Load one split as ({"x": ..., "label": ...}, spec), the arrays numpy.

    Images are uint8 [n, height, width, channels] in 0..levels-1, labels int32 [n] where there are
    classes; a 2-D density gives fixed samples of it, float32 [n, 2]. Images are prepared on first
    use in `data_dir` (default: tfds' own folder) and read from there. A split of more than 4 GiB,
    and with `in_memory=False` any of images, is a record source on disk instead, which `batch_at`
    and `stream` take alike.

    "folder:PATH" is a folder of images, its subfolders the classes: each image is cut to the square
    in its middle and resized to `image_size` (None: left as it is, all must be of one size), in
    colour or `grey`, with one in ten to test on (or the folders train and test). It is prepared
    once for every state of the files. unreadable: "refuse" a folder with a file that is no whole
    image, or "skip" such files.

    Raises ValueError: unknown name (with the nearest valid one) or split, a split over 4 GiB that
    was asked for with in_memory=True, a folder that cannot be used, its options with another set.
    RuntimeError: not on disk and not to be downloaded from here.

    >>> data, spec = load("8gaussians", "test")
    >>> spec.kind, spec.shape
    ('points', (2,))
    """
    check_name(name)
    options = folder_options(name, image_size, grey, unreadable)
    if name in DENSITIES:
        checks.one_of("split", split, DENSITY_SPLITS)
        key = jax.random.key(list(DENSITY_SPLITS).index(split), impl="threefry2x32")
        x = np.asarray(DENSITIES[name].sample(key, DENSITY_SPLITS[split]))
        return {"x": x}, DataSpec(name, "points", (2,), None, None)
    records, shape, classes = open_images(name, split, data_dir, options)
    spec = DataSpec(name, "images", shape, 17 if name == "digits" else 256, classes)
    size = len(records) * int(np.prod(shape))
    if in_memory is False or (in_memory is None and size > IN_MEMORY_LIMIT):
        return records, spec
    if size > IN_MEMORY_LIMIT:
        raise ValueError(
            f"{name} {split} takes {size / 2**30:.1f} GiB in memory, more than the limit of "
            f"{IN_MEMORY_LIMIT / 2**30:.1f}: leave out in_memory=True to read each batch from disk"
        )
    return check_arrays(_read_all(records), ranks={"x": 4, "label": 1}), spec


def check_name(name: str) -> None:
    """Raise ValueError unless the data set is known; names the nearest valid name."""
    ours = [*DENSITIES, *IMAGES, "folder:PATH"]
    if name in ours[:-1] or name.startswith(FOLDER):
        return
    known = known_to_tfds()
    if name in known:
        return
    near = difflib.get_close_matches(str(name), ours + known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"data set must be one of {ours} or the tfds name of an image data set, got {name!r}{hint}"
    )


def folder_options(name: str, image_size: int | None, grey: bool, unreadable: str) -> Any:
    """The options of "folder:PATH"; None of another set, which must have none (ValueError)."""
    if name.startswith(FOLDER):
        from genjax.data.folder import Options

        return Options(image_size, grey, unreadable)
    given = {"image_size": image_size, "grey": grey, "unreadable": unreadable}
    if given != {"image_size": None, "grey": False, "unreadable": "refuse"}:
        raise ValueError(f"image_size, grey and unreadable are for folder:PATH, got {given}")
    return None


def _read_all(records: ImageRecords) -> dict[str, np.ndarray]:
    size = len(records)
    parts = [records.take(np.arange(s, min(s + _CHUNK, size))) for s in range(0, size, _CHUNK)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
