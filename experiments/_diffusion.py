"""How experiments.diffusion judges its samples and its density."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax import diffusion as gd
from genjax import metrics
from genjax.data import DENSITIES, DataSpec, Scaling


def judge_images(
    spec: DataSpec, train: Any, test: Any, images: np.ndarray, labels: Any
) -> dict[str, Any]:
    """Precision, recall and memorisation in pixels; for digits, what a classifier reads."""
    real, held, fake = (
        np.float32(x.reshape(len(x), -1)) for x in (train["x"][:10_000], test["x"], images)
    )
    fidelity, between = metrics.precision_recall(real, fake), metrics.precision_recall(real, held)
    summary = {
        "precision": fidelity.precision,
        "recall": fidelity.recall,
        "precision_of_test_split": between.precision,
        "recall_of_test_split": between.recall,
        "memorisation_share": metrics.memorisation_share(real, held, fake),
    }
    if spec.name == "digits":
        from sklearn.svm import SVC

        reader = SVC(gamma=0.001, C=10).fit(real, train["label"])
        summary["label_read"] = (reader.predict(fake) == labels).mean()
    return summary


def judge_likelihood(
    model: Any, params: Any, test: Any, key: jax.Array, num_steps: int
) -> dict[str, Any]:
    """Bits/dim of the test split by the probability flow, without and with the label.

    One dequantisation and two probes of the trace for each image: both unbiased.
    """
    spec, x = model.spec, test["x"][:1000]
    key_x, key_probe = jax.random.split(key)
    y = model.data(x, key_x)
    offset = Scaling(spec.levels or 0).log_det_per_dim

    @jax.jit
    def bits(params: Any, y: jax.Array, label: Any) -> jax.Array:
        value, _ = gd.log_likelihood(
            model.denoise(params, label),
            y,
            process=model.process,
            key=key_probe,
            num_probes=2,
            num_steps=num_steps,
        )
        return metrics.bits_per_dim(value, math.prod(spec.shape), log_det_per_dim=offset).mean()

    if spec.classes is None:
        return {"bits_per_dim": bits(params, y, None)}
    none = np.full(len(x), spec.classes, np.int32)  # the row for "no class"
    return {
        "bits_per_dim": bits(params, y, none),
        "bits_per_dim_given_label": bits(params, y, test["label"][: len(x)]),
    }


def judge_points(
    model: Any, params: Any, test: Any, samples: Any, key: Any, num_steps: int
) -> dict[str, Any]:
    """Distance of samples to test points, nats of the test points, and the score's error."""
    spec = model.spec
    summary = {"sliced_wasserstein": metrics.sliced_wasserstein(key, test[: len(samples)], samples)}
    points = model.data(jnp.asarray(test[:1000]), None)
    if num_steps:
        denoise = model.denoise(params)
        value, _ = jax.jit(
            lambda y: gd.log_likelihood(denoise, y, process=model.process, num_steps=num_steps)
        )(points)
        summary["log_likelihood"] = value.mean()
        summary["log_likelihood_of_the_law"] = (
            DENSITIES[spec.name].log_prob(jnp.asarray(test[:1000])).mean()
        )
    means, std = (getattr(DENSITIES[spec.name], name, None) for name in ("means", "std"))
    if means is not None and std is not None:
        summary["score_error"] = score_error(model, params, points, means - model.shift, std, key)
    return summary


def score_error(
    model: Any, params: Any, x: jax.Array, means: Any, std: float, key: jax.Array
) -> dict[str, float]:
    """|score - exact| / |exact| in L2 over noised data, at five noise levels."""
    mixture = gd.GaussianMixture(
        jnp.full(len(means), 1 / len(means)),
        jnp.asarray(means, jnp.float32),
        jnp.broadcast_to(std**2 * jnp.eye(2), (len(means), 2, 2)),
    )
    exact, found = gd.mixture_denoiser(mixture, process=model.process), model.denoise(params)
    errors = {}
    for level in (0.05, 0.2, 0.5, 1.0, 3.0):
        t = jnp.full(len(x), model.process.time_of_noise_ratio(level))
        alpha, sigma = model.process.alpha(t)[:, None], model.process.sigma(t)[:, None]
        x_t = alpha * x + sigma * jax.random.normal(key, x.shape)
        best = exact(x_t, t)
        gap = jnp.linalg.norm(found(x_t, t) - best) / jnp.linalg.norm(best - x_t / alpha)
        errors[str(level)] = float(gap)
    return errors
