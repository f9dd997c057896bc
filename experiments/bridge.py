"""Bridges between two sets of points, or from noise to images: dX = b(X, t) dt + sigma dW.

    independent  both ends drawn by themselves: a bridge
    entropic     ends of a batch paired by the entropic plan at epsilon = 2 sigma^2: Schroedinger's
    fitting      two drifts, forward and backward, each trained on the other's simulated ends
                 (iterated Markovian fitting, with the two refits in every step)

    python -m experiments.bridge
    python -m experiments.bridge --pairs fitting --sigma 1
    python -m experiments.bridge --dataset moons --source 8gaussians --pairs independent

The summary has the mean squared distance between the ends of a path, which Schroedinger's bridge
makes small, and the sliced Wasserstein distance of the ends to the data.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run, _system
from experiments._data import Data, load_data
from experiments._system import System, train
from genjax import checks, flows
from genjax.data import DENSITIES
from genjax.metrics import sliced_wasserstein
from genjax.networks import TimeMLP
from genjax.numerics import at_least_float32
from genjax.transport import sinkhorn_from_cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a bridge from a source to a data set."""

    dataset: str = "moons"
    """Where the bridge leads: a two-dimensional density, or images."""
    source: str = "8gaussians"
    """Where it begins: a two-dimensional density, or normal (which images need)."""
    pairs: Literal["independent", "entropic", "fitting"] = "entropic"
    """How the ends of the bridges are paired, see above."""
    sigma: float = 0.5
    """Noise of the reference, sigma dW; 0 leaves a flow (independent)."""
    warm: float = 0.3
    """Share of the steps that train on independent pairs before those simulated (fitting)."""
    simulate: int = 20
    """Euler-Maruyama steps of the pairs in training (fitting)."""
    num_steps: int = 100
    """Euler-Maruyama steps of a sample."""
    width: int = 128
    """Hidden units."""
    depth: int = 3
    """Residual layers."""
    learning_rate: float = 2e-3
    ema: float = 0.998
    steps: int = 4000
    batch_size: int = 256
    steps_per_call: int = 50
    log_every: int = 100


def main(config: Config) -> dict[str, Any]:
    """Train, sample, judge, draw; returns the summary."""
    data = load_data(config)
    return train(config, build(config, data), data, partial(report, config, data))


def build(config: Config, data: Data) -> System:
    """Both drifts with their losses; without fitting the backward one is not there."""
    network, scaling = TimeMLP(config.width, config.depth), data.scaling()
    names = ("forward", "backward") if config.pairs == "fitting" else ("forward",)
    if config.pairs == "entropic":
        checks.positive("sigma", config.sigma)
    source, warm = source_of(config, data), int(config.warm * config.steps)

    def init(key: jax.Array) -> Any:
        x, t = jnp.zeros((1, *data.spec.shape)), jnp.zeros(1)
        keys = jax.random.split(key, len(names))
        return {name: network.init(k, x, t) for name, k in zip(names, keys, strict=True)}

    def drift(params: Any, name: str) -> Callable[..., jax.Array]:
        return lambda x, t: network.apply(params[name], x, t)

    def simulated(params: Any, key: Any, pairs: flows.Pairs) -> tuple[flows.Pairs, flows.Pairs]:
        """Pairs by the forward drift from the first ends, by the backward one from the second."""
        keys, options = jax.random.split(key), {"sigma": config.sigma, "num_steps": config.simulate}
        ahead = flows.bridge_pairs(drift(params, "forward"), keys[0], pairs.x0, **options)
        back = drift(params, "backward")
        return ahead, flows.bridge_pairs(back, keys[1], pairs.x1, backward=True, **options)

    def loss(params: Any, key: jax.Array, batch: Any, step: Any) -> Any:
        key_data, key_source, key_pairs, key_sim, *keys = jax.random.split(key, 6)
        # Simulated ends are float32, whatever the networks multiply in.
        x1 = at_least_float32(scaling.dequantise(key_data, batch["x"]))
        coupling = plan(config.sigma) if config.pairs == "entropic" else None
        pairs = flows.sample_pairs(key_pairs, x1, x0=source(key_source, len(x1)), coupling=coupling)
        if config.pairs != "fitting":
            forward, _ = flows.bridge_matching_loss(
                drift(params, "forward"), keys[0], *pairs, sigma=config.sigma
            )
            return forward, {}, {}
        ahead, behind = jax.lax.cond(
            step < warm, lambda: (pairs, pairs), lambda: simulated(params, key_sim, pairs)
        )
        # Each drift learns from the ends that the other simulated.
        forward, _ = flows.bridge_matching_loss(
            drift(params, "forward"), keys[0], *behind, sigma=config.sigma
        )
        backward, _ = flows.bridge_matching_loss(
            drift(params, "backward"), keys[1], ahead.x1, ahead.x0, sigma=config.sigma
        )
        return forward + backward, {"forward": forward, "backward": backward}, {}

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        return scaling.to_levels(ends(config, data, params, key, n).x1)

    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps, 0.01)
    return System(
        init,
        loss,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        sample,
        evaluations=config.num_steps,
        init_carry=lambda key, params: jnp.zeros((), jnp.int32),
        absorb=lambda step, params, seen: step + 1,
    )


def ends(config: Config, data: Data, params: Any, key: jax.Array, n: int) -> flows.Pairs:
    """Both ends of n paths of the forward diffusion."""
    key_source, key_noise = jax.random.split(key)
    drift = partial(TimeMLP(config.width, config.depth).apply, params["forward"])
    x0 = source_of(config, data)(key_source, n)
    return flows.bridge_pairs(drift, key_noise, x0, sigma=config.sigma, num_steps=config.num_steps)


def source_of(config: Config, data: Data) -> Callable[[jax.Array, int], jax.Array]:
    """(key, n) -> examples of the source, in the shape of the data."""
    if config.source == "normal":
        return lambda key, n: jax.random.normal(key, (n, *data.spec.shape))
    checks.one_of("source", config.source, (*DENSITIES, "normal"))
    if data.kind != "points":
        name = data.spec.name
        raise ValueError(f"source must be normal for images ({name!r}), got {config.source!r}")
    return DENSITIES[config.source].sample


def plan(sigma: float) -> Callable[[jax.Array], jax.Array]:
    """The entropic coupling of squared distances: cost |x - y|^2 / 2 at epsilon = sigma^2."""
    return lambda cost: sinkhorn_from_cost(cost, epsilon=2 * sigma**2).plan()


def report(config: Config, data: Data, run: Any, params: Any, samples: Any) -> dict[str, Any]:
    """How far a path goes, and in the plane how far its end is from the data."""
    key, n = _system.keys(config.seed).test, 2000
    pairs = jax.jit(lambda p: ends(config, data, p, key, n))(params)
    moved = jnp.mean(jnp.sum(jnp.square(pairs.x1 - pairs.x0).reshape(n, -1), axis=1))
    found: dict[str, Any] = {"path_squared": moved}
    if data.kind == "points":
        test = jnp.asarray(data.test["x"][:n])
        found["sliced_wasserstein"] = sliced_wasserstein(key, test, pairs.x1)
        x0, x1 = np.asarray(pairs.x0), np.asarray(pairs.x1)

        def plot(axes: Any) -> None:
            axes[0].plot(*np.stack([x0[:200], x1[:200]]).T, color="0.7", linewidth=0.5)
            for x in (x0, x1):
                axes[0].plot(x[:, 0], x[:, 1], ".", markersize=2)
            axes[0].set(aspect="equal")

        title = f"ends of paths from {config.source} to {config.dataset}"
        _pictures.save_figure(run.folder / "paths.png", plot, title=title)
    return found


if __name__ == "__main__":
    _run.launch(main, Config)
