"""What three constrained critics make of W1 between two fixed 1-D samples, where W1 is known.

For any critic, bound / largest slope is a lower bound on W1. A clipped critic's scale is arbitrary,
and a penalised one's slope passes 1 a little, so that its bound alone may pass W1; the slope is
read off a fine grid.

    python -m experiments.w1_estimates
    python -m experiments.w1_estimates --steps 5000 --penalty 100
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run
from experiments.gan import leaky
from experiments.wgan import projection
from genjax.adversarial import gradient_penalty, wasserstein
from genjax.networks import MLP, LipschitzMLP

CONSTRAINTS = ("clip", "penalty", "lipschitz")
HIDDEN = (64, 64, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Train a critic under each constraint, and nothing else."""

    dataset: Literal["line"] = "line"
    """Two samples of 512 points each."""
    steps: int = 5000
    """Updates of each critic."""
    limit: float = 0.01
    """Largest weight of a clipped critic."""
    penalty: float = 10.0
    """Weight of the gradient penalty."""


def main(config: Config) -> dict[str, Any]:
    """Train the critics, compare, draw; returns the summary."""
    from scipy.stats import wasserstein_distance

    key_x, key_y, key_f = jax.random.split(jax.random.key(config.seed), 3)
    n = 512
    x = 0.5 + 1.5 * jax.random.normal(key_x, (n, 1))
    y = jnp.where(jnp.arange(n)[:, None] % 3 == 0, -2.0, 1.0)
    y = y + 0.5 * jax.random.normal(key_y, (n, 1))
    summary: dict[str, Any] = {"exact_w1": float(wasserstein_distance(x[:, 0], y[:, 0]))}
    curves = {}
    with _run.start_run(config) as run:
        for constraint in CONSTRAINTS:
            bound, slope, curve = estimate(config, constraint, key_f, x, y)
            summary |= {
                f"{constraint}_bound": bound,
                f"{constraint}_largest_slope": slope,
                f"{constraint}_estimate": bound / slope,
            }
            curves[constraint] = (curve[0], curve[1] / slope)
        _pictures.save_curves(run.folder / "critics.png", curves, x_label="x", y_label="critic")
        return _run.finish(run, summary)


def estimate(
    config: Config, constraint: str, key: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[float, float, tuple[np.ndarray, np.ndarray]]:
    """Bound and largest slope of a trained critic, and its curve."""
    if constraint == "lipschitz":
        module = LipschitzMLP(HIDDEN)
        score = module.apply
    else:
        module = MLP((*HIDDEN, 1), activation=leaky)
        score = lambda params, x: module.apply(params, x)[:, 0]  # noqa: E731
    rate = 5e-3 if constraint == "lipschitz" else 1e-3
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, config.steps), b2=0.9)
    project = projection(constraint, config.limit) or (lambda params: params)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        value = wasserstein(score(params, x), score(params, y)).critic
        if constraint == "penalty":
            # One-sided: the slope changes its sign, and a penalty on slopes below 1 too would
            # keep the critic where it starts, on a line.
            penalty = gradient_penalty(lambda x: score(params, x), key, x, y, one_sided=True)
            value = value + config.penalty * jnp.mean(penalty)
        return value

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        params, opt_state = carry
        grads = jax.grad(loss)(params, jax.random.fold_in(key, i))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (project(optax.apply_updates(params, updates)), opt_state), None

    params = project(module.init(key, x))
    carry = (params, optimizer.init(params))
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(config.steps)))(carry)
    grid = jnp.linspace(-6, 6, 2001)[:, None]
    values = score(params, grid)
    slope = float(jnp.max(jnp.abs(jnp.diff(values)) / (grid[1, 0] - grid[0, 0])))
    bound = float(wasserstein(score(params, x), score(params, y)).bound)
    return bound, slope, (np.asarray(grid[:, 0]), np.asarray(values - values.mean()))


if __name__ == "__main__":
    _run.launch(main, Config)
