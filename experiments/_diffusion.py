"""What experiments.diffusion has to tell beyond the numbers of every experiment."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from experiments._data import Data
from genjax import diffusion as gd
from genjax import metrics
from genjax.data import DENSITIES


def bits_given_label(
    model: Any, params: Any, data: Data, key: jax.Array, num_steps: int
) -> dict[str, Any]:
    """Bits/dim of test images given their labels, as `bits_per_dim` is measured without."""
    key_x, key_probe = jax.random.split(key)
    scaling, x = data.scaling(), data.test["x"][:1000]
    y = scaling.dequantise(key_x, x) - model.shift

    @jax.jit
    def bits(params: Any, y: jax.Array, label: Any) -> jax.Array:
        denoise, process = model.denoise(params, label), model.process
        value, _ = gd.log_likelihood(
            denoise, y, process=process, key=key_probe, num_probes=2, num_steps=num_steps
        )
        size, log_det = math.prod(data.spec.shape), scaling.log_det_per_dim
        return metrics.bits_per_dim(value, size, log_det_per_dim=log_det).mean()

    return {"bits_per_dim_given_label": bits(params, y, data.test["label"][: len(x)])}


def judge_points(
    model: Any, params: Any, data: Data, samples: Any, key: jax.Array
) -> dict[str, Any]:
    """Distance of samples to test points, and the score's error where the law is a mixture."""
    test = data.test["x"]
    summary = {"sliced_wasserstein": metrics.sliced_wasserstein(key, test[: len(samples)], samples)}
    means, std = (getattr(DENSITIES[data.spec.name], name, None) for name in ("means", "std"))
    if means is not None and std is not None:
        points = jnp.asarray(test[:1000]) - model.shift
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
