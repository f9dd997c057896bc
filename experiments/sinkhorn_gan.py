"""Generators trained by optimal transport: the Sinkhorn divergence with a fixed or a learned cost,
and OT-GAN's minibatch energy.

Three variants (Genevay, Peyre, Cuturi 2018; Salimans et al. 2018), one loss each of a batch of
data y and a batch of samples x:

    fixed    S(x, y) with the cost |x - y|^2
    learned  S with |f(x) - f(y)|^2, least for the generator and greatest for the features f
    otgan    the six costs of two half batches, cosine distance of f, plans held fixed

    python -m experiments.sinkhorn_gan
    python -m experiments.sinkhorn_gan --variant otgan --generator-updates 3 --steps 2000
    python -m experiments.sinkhorn_gan --dataset 25gaussians
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _run
from experiments._data import Data, load_data
from experiments._system import Row, System, train
from genjax import checks
from genjax.networks import MLP
from genjax.transport import (
    cosine,
    minibatch_energy_distance,
    sinkhorn_divergence,
    squared_euclidean,
)

FIXED, LEARNED = {"variant": "fixed"}, {"variant": "learned"}
OTGAN = {"variant": "otgan", "generator_updates": 3}
ROWS = (
    Row("sinkhorn_fixed", "Sinkhorn, fixed cost", FIXED, FIXED),
    Row("sinkhorn_learned", "Sinkhorn, learned cost", LEARNED, LEARNED),
    Row("otgan", "OT-GAN", OTGAN, OTGAN),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a generator by transport."""

    dataset: str = "digits"
    """digits or another image set, or a 2-D density such as 25gaussians."""
    variant: Literal["fixed", "learned", "otgan"] | None = None
    """The loss, see above (default: learned for images, fixed in the plane)."""
    steps: int | None = None  # type: ignore[assignment]
    """Updates of the generator (default: 1,500 for images, 10,000 in the plane)."""
    batch_size: int | None = None  # type: ignore[assignment]
    """Examples, and samples, in one update (default: 512 for images, 256 in the plane)."""
    steps_per_call: int = 50
    ema: float = 0.995
    epsilon: float | None = None
    """Entropy, in parts of the mean cost (default: 0.01 for images, 0.0015 in the plane)."""
    num_iterations: int = 10
    """Sinkhorn iterations of every problem in a training step. Few are better than all: see
    `divergence`."""
    latent_dim: int | None = None
    """Dimensions of the noise (default: 16 for images, 2 in the plane)."""
    width: int | None = None
    """Width of the hidden layers of both networks (default: 256 for images, 128 in the plane)."""
    depth: int = 4
    """Hidden layers of the generator; the features have two."""
    features: int = 64
    """Dimensions of the feature space of a learned cost."""
    learning_rate: float | None = None
    """Adam's rate for the generator, falling to 0 along a cosine (default: 0.002 for images, 0.003
    in the plane)."""
    critic_learning_rate: float = 4e-4
    """Adam's rate for the features, falling likewise."""
    generator_updates: int = 2
    """Updates of the generator for one of the features."""
    num_samples: int = 10_000
    """Samples for the modes covered in the plane; images take as many as the training set has."""


# What the options that were left open are, for images and in the plane.
OPEN = ("variant", "steps", "batch_size", "epsilon", "latent_dim", "width", "learning_rate")
DEFAULTS = {
    "images": ("learned", 1500, 512, 0.01, 16, 256, 2e-3),
    "points": ("fixed", 10_000, 256, 0.0015, 2, 128, 3e-3),
}


def settled(config: Any, kind: str) -> Any:
    """Give the options that were left open their values for this kind of data."""
    defaults = zip(OPEN, DEFAULTS[kind], strict=True)
    left = {name: value for name, value in defaults if getattr(config, name) is None}
    return dataclasses.replace(config, **left)


def main(config: Config) -> dict[str, Any]:
    """Train, sample, evaluate; returns the summary."""
    data = load_data(config)
    config = settled(config, data.kind)
    return train(config, build(config, data), data)


def build(config: Config, data: Data) -> System:
    """The generator, and the features of a learned cost."""
    config = settled(config, data.kind)
    checks.positive("epsilon", config.epsilon)
    checks.integer("batch_size", config.batch_size, 2)
    plane, event = data.kind == "points", data.spec.shape
    size, scaling = math.prod(event), data.scaling()
    spread = float(np.std(data.train["x"])) if plane else 1.0
    generator = MLP((config.width,) * config.depth + (size,), activation=jax.nn.relu)
    critic = MLP((config.width, config.width, config.features), activation=jax.nn.leaky_relu)

    def init(key: jax.Array) -> Any:
        key_x, key_f = jax.random.split(key)
        params = {"generator": initialise(generator, key_x, config.latent_dim)}
        if config.variant != "fixed":
            params["critic"] = initialise(critic, key_f, size)
        return params

    def generate(params: Any, key: jax.Array, n: int) -> jax.Array:
        out = generator.apply(params["generator"], jax.random.normal(key, (n, config.latent_dim)))
        return spread * out if plane else jnp.tanh(out)

    def embed(params: Any, x: jax.Array) -> jax.Array:
        # On the sphere the learned cost is at most 4: it cannot grow without end.
        return unit(critic.apply(params["critic"], x))

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        n = len(batch["x"])
        y = scaling.to_continuous(batch["x"]).reshape(n, size)
        x = generate(params, key, n)
        if config.variant != "fixed":
            x, y = embed(params, x), embed(params, y)
        value, error = LOSSES[config.variant](x, y, config.epsilon, config)
        # One number for the whole batch: every example carries it, and so does their mean.
        return jnp.full((n,), value), {"marginal_error": jnp.full((n,), error)}

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        return scaling.to_levels(generate(params, key, n).reshape(n, *event))

    count = config.num_samples if plane else None
    return System(init, loss, two_players(config), sample, count=count)


def two_players(config: Config) -> optax.GradientTransformation:
    """Descend in the generator, ascend in the features, which move once in several steps.

    One loss gives both gradients. The features' are averaged over the generator's updates.
    """

    def adam(rate: float, steps: int) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(rate, steps), b1=0.5, b2=0.99)

    rounds = max(1, config.steps // config.generator_updates)
    ascent = optax.chain(optax.scale(-1.0), adam(config.critic_learning_rate, rounds))
    return optax.partition(
        {
            "generator": adam(config.learning_rate, config.steps),
            "critic": optax.MultiSteps(ascent, config.generator_updates).gradient_transformation(),
        },
        lambda params: {name: name for name in params},
    )


def initialise(network: Any, key: jax.Array, size: int) -> Any:
    """Draw the parameters, with He's factor for the half of the variance that relu takes away."""
    params = network.init(key, jnp.zeros((1, size)))
    return jax.tree.map(lambda w: math.sqrt(2) * w if w.ndim == 2 else w, params)


def unit(v: jax.Array) -> jax.Array:
    """Scale every row to length 1."""
    return v * jax.lax.rsqrt(jnp.sum(v * v, axis=1, keepdims=True) + 1e-8)


def divergence(x: jax.Array, y: jax.Array, epsilon: float, config: Config) -> tuple[Any, Any]:
    """Sinkhorn divergence with the squared distance, epsilon in parts of its mean.

    The iterations end with the marginal of x exact and that of y nearly so. Exact transport would
    also level the chance counts of the modes in the two batches, which is noise to the generator.
    """
    scale = jax.lax.stop_gradient(jnp.mean(squared_euclidean(x, y)))
    result = sinkhorn_divergence(
        y, x, epsilon=epsilon * scale, num_iterations=config.num_iterations
    )
    return result.value, result.marginal_error


def energy(x: jax.Array, y: jax.Array, epsilon: float, config: Config) -> tuple[Any, Any]:
    """OT-GAN's distance between two halves of x and two halves of y."""
    half = len(x) // 2
    scale = jax.lax.stop_gradient(jnp.mean(cosine(x, y)))
    result = minibatch_energy_distance(
        x[:half],
        x[half : 2 * half],
        y[:half],
        y[half : 2 * half],
        epsilon=epsilon * scale,
        cost_fn=cosine,
        num_iterations=config.num_iterations,
    )
    return result.value, result.marginal_error


LOSSES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "fixed": divergence,
    "learned": divergence,
    "otgan": energy,
}


if __name__ == "__main__":
    _run.launch(main, Config)
