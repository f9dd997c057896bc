"""Wasserstein GANs: clipped weights, the gradient penalty, or a critic that is 1-Lipschitz.

    bound      = mean f(data) - mean f(samples) <= W1(data, samples) for a 1-Lipschitz critic f
    clip       weights in [-limit, limit] after each update (Arjovsky et al. 2017)
    penalty    critic's loss + weight * mean (|grad f| - 1)^2 between data and samples
    lipschitz  orthonormal weights and sorting activations: 1-Lipschitz by construction

    python -m experiments.wgan
    python -m experiments.wgan --conditional --network dcgan
    python -m experiments.wgan --constraint lipschitz
    python -m experiments.wgan --dataset line          (W1 of two 1-D samples by all three)

The samples are scored as in experiments.gan.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run
from experiments.gan import AdversarialConfig, Players, build, leaky, real_and_fake, train
from genjax.adversarial import clip_weights, gradient_penalty, wasserstein
from genjax.data import load
from genjax.networks import MLP, LipschitzMLP

CONSTRAINTS = ("clip", "penalty", "lipschitz")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(AdversarialConfig):
    """Train a WGAN and score its samples."""

    constraint: Literal["clip", "penalty", "lipschitz"] = "penalty"
    """What keeps the critic Lipschitz, see above."""
    limit: float = 0.01
    """Largest weight of a clipped critic."""
    penalty: float = 10.0
    """Weight of the gradient penalty."""
    one_sided: bool = False
    """Penalise only gradients above 1."""
    n_critic: int = 3
    """Updates of the critic before each one of the generator (5 in the papers)."""
    learning_rate: float = 1e-3
    """Adam's rate for both players, falling along a cosine to a tenth."""
    beta1: float = 0.0
    """Adam's first decay."""
    beta2: float = 0.9
    """Adam's second decay."""


def main(config: Config) -> dict[str, Any]:
    """Train, sample, evaluate; returns the summary."""
    if config.dataset == "line":
        return estimate(config)
    arrays, spec = load(config.dataset, "train", data_dir=config.data_dir)
    players = build(config, spec)
    if config.constraint == "lipschitz":
        players = lipschitz(config, players, tuple(spec.shape))
    score = players.score

    def critic_loss(critic: Any, generator: Any, key: Any, batch: Any) -> Any:
        real, fake, label = real_and_fake(config, players, generator, key, batch)
        losses = wasserstein(score(critic, real, label), score(critic, fake, label))
        if config.constraint != "penalty":
            return losses.critic, {"bound": losses.bound}
        penalty = gradient_penalty(
            lambda x: score(critic, x, label),
            jax.random.fold_in(key, 1),
            real,
            fake,
            one_sided=config.one_sided,
        )
        terms = {"bound": losses.bound, "penalty": penalty}
        return losses.critic + config.penalty * jnp.mean(penalty), terms

    def generator_loss(critic: Any, generator: Any, key: Any, batch: Any) -> Any:
        _, fake, label = real_and_fake(config, players, generator, key, batch)
        scores = score(critic, fake, label)
        return wasserstein(scores, scores).generator, {}

    return train(
        config, players, arrays, spec, critic_loss, generator_loss, project=projection(config)
    )


def projection(config: Config) -> Callable[[Any], Any] | None:
    """What is done to the critic's parameters after each update."""
    if config.constraint == "clip":
        return lambda params: clip_weights(params, config.limit)
    return None


def lipschitz(config: Config, players: Players, event: tuple[int, ...]) -> Players:
    """The same generator with a critic that is 1-Lipschitz by construction."""
    if config.conditional:
        raise ValueError("constraint lipschitz has no conditional critic, got conditional=True")
    critic = LipschitzMLP((config.width,) * config.depth)
    return players._replace(
        init_critic=lambda key: critic.init(key, jnp.zeros((1, *event))),
        score=lambda params, x, label: critic.apply(params, x),
    )


def estimate(config: Config) -> dict[str, Any]:
    """Train only the critic, between two fixed 1-D samples; each constraint's estimate of W1.

    The largest slope is read off a fine grid: a clipped critic's scale is arbitrary, and a
    penalised one's slope passes 1 a little, so that its estimate may pass W1.
    """
    from scipy.stats import wasserstein_distance

    _run.refuse_budget(config, "each critic on the line trains in one compiled call")
    key_x, key_y, key_f = jax.random.split(jax.random.key(config.seed), 3)
    n = 512
    x = 0.5 + 1.5 * jax.random.normal(key_x, (n, 1))
    y = jnp.where(jnp.arange(n)[:, None] % 3 == 0, -2.0, 1.0)
    y = y + 0.5 * jax.random.normal(key_y, (n, 1))
    exact = float(wasserstein_distance(np.asarray(x[:, 0]), np.asarray(y[:, 0])))
    grid = jnp.linspace(-6, 6, 2001)[:, None]
    hidden = (64, 64, 64)

    def run_one(constraint: str) -> tuple[dict[str, float], np.ndarray]:
        if constraint == "lipschitz":
            module = LipschitzMLP(hidden)
            score = module.apply
        else:
            module = MLP((*hidden, 1), activation=leaky)
            score = lambda params, x: module.apply(params, x)[:, 0]  # noqa: E731
        rate = 5e-3 if constraint == "lipschitz" else 1e-3
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, config.steps), b2=0.9)
        project = projection(dataclasses.replace(config, constraint=constraint)) or (lambda p: p)

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
            grads = jax.grad(loss)(params, jax.random.fold_in(key_f, i))
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (project(optax.apply_updates(params, updates)), opt_state), None

        params = project(module.init(key_f, x))
        carry = (params, optimizer.init(params))
        (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(config.steps)))(carry)
        values = score(params, grid)
        slope = float(jnp.max(jnp.abs(jnp.diff(values)) / (grid[1, 0] - grid[0, 0])))
        bound = float(wasserstein(score(params, x), score(params, y)).bound)
        return {"bound": bound, "largest_slope": slope}, np.asarray(values - values.mean())

    with _run.start_run(config) as run:
        summary: dict[str, Any] = {"exact_w1": exact}
        curves = {}
        for constraint in CONSTRAINTS:
            numbers, values = run_one(constraint)
            summary |= {f"{constraint}_{name}": number for name, number in numbers.items()}
            # For any critic, bound / largest slope is a lower bound on W1.
            summary[f"{constraint}_estimate"] = numbers["bound"] / numbers["largest_slope"]
            curves[constraint] = (grid[:, 0], values / numbers["largest_slope"])
        _pictures.save_curves(run.folder / "critics.png", curves, x_label="x", y_label="critic")
        return _run.finish(run, summary)


if __name__ == "__main__":
    _run.launch(main, Config)
