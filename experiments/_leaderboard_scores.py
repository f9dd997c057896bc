"""What stands around the rows of the families: costs, the ceiling, the floors of scikit-learn."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments import _judge
from experiments._data import Data
from genjax.data import DENSITIES, DataSpec
from genjax.metrics import bits_per_dim


def costs(summary: Mapping[str, Any], spec: DataSpec) -> dict[str, float]:
    """Likelihood and costs, from the summary of a run; what it does not have is left out."""
    bits = summary.get("bits_per_dim")
    nats = summary.get("test_log_likelihood")
    if spec.kind == "points" and nats is not None:
        bits = float(bits_per_dim(nats, int(np.prod(spec.shape))))
    drawn, seconds = summary.get("samples"), summary.get("sampling_seconds")
    training = summary.get("training_seconds")
    found = {
        "bits_per_dim": bits,
        "evaluations": summary.get("sampling_evaluations"),
        "sampling_seconds": 1000 * seconds / drawn if drawn and seconds is not None else None,
        # Compiling, which the budget does not count either, is left out.
        "training_seconds": training and training - summary.get("first_call_seconds", 0.0),
        "steps": summary.get("steps_done"),
        "parameters": summary.get("parameters"),
    }
    return {name: value for name, value in found.items() if value is not None}


def ceiling(data: Data) -> tuple[np.ndarray, dict]:
    """The test split as if it were samples; in the plane with the law's own likelihood."""
    x = data.test["x"]
    if data.kind == "images":
        return x, {}
    nats = float(np.mean(DENSITIES[data.spec.name].log_prob(jax.numpy.asarray(x))))
    return x[: _judge.MOST["points"]], {"bits_per_dim": float(bits_per_dim(nats, x.shape[1]))}


def floors(data: Data, seed: int) -> dict[str, Callable[[], tuple[np.ndarray, dict[str, float]]]]:
    """scikit-learn's Gaussian mixture and kernel density estimate: samples, likelihood, costs.

    Images are dequantised in units of their levels. The bandwidth is the best of ten by the
    likelihood of held-out training points.
    """
    scaling, plane = data.scaling(0.0, float(data.spec.levels or 1)), data.kind == "points"

    def flat(x: np.ndarray, draw: int) -> np.ndarray:
        y = scaling.dequantise(jax.random.fold_in(key, draw), x)
        return np.asarray(y, np.float64).reshape(len(x), -1)

    key = jax.random.key(seed)
    x, fresh, count = flat(data.train["x"], 0), flat(data.test["x"], 1), data.count

    def finish(model: Any, parameters: int, begun: float, sample: Callable[[int], Any]) -> Any:
        training = time.monotonic() - begun
        begun = time.monotonic()
        y = np.asarray(sample(count)).reshape(count, *data.spec.shape)
        drawing = time.monotonic() - begun
        return np.asarray(scaling.to_levels(y.astype(np.float32))), {
            "bits_per_dim": float(bits_per_dim(np.mean(model.score_samples(fresh)), x.shape[1])),
            "sampling_seconds": 1000 * drawing / count,
            "training_seconds": training,
            "parameters": parameters,
        }

    def mixture() -> Any:
        from sklearn.mixture import GaussianMixture

        regular = 1e-4 if plane else 0.1
        begun = time.monotonic()
        model = GaussianMixture(10, reg_covar=regular, random_state=seed).fit(x)
        dims = x.shape[1]
        parameters = 10 * (dims + dims * (dims + 1) // 2) + 9
        return finish(model, parameters, begun, lambda n: shuffled(model.sample(n)[0]))

    def kernels() -> Any:
        from sklearn.model_selection import GridSearchCV
        from sklearn.neighbors import KernelDensity

        widths = np.std(x) * np.geomspace(0.01, 1.0, 10)
        begun = time.monotonic()
        search = GridSearchCV(KernelDensity(), {"bandwidth": widths}, cv=3).fit(x[:2000])
        model = KernelDensity(**search.best_params_).fit(x)
        return finish(model, x.size + 1, begun, lambda n: model.sample(n, random_state=seed))

    def shuffled(y: np.ndarray) -> np.ndarray:
        # The mixture gives its samples one component after another.
        return np.random.default_rng(seed).permutation(y)

    return {"Mixture of 10 Gaussians": mixture, "Kernel density": kernels}
