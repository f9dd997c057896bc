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

from experiments import _pictures, _run, _samples
from genjax.data import DENSITIES, load
from genjax.data.scaling import Scaling
from genjax.data.synthetic import GaussianMixture
from genjax.metrics import (
    high_quality_share,
    memorisation_share,
    modes_covered,
    precision_recall,
)
from genjax.networks import MLP
from genjax.training import init_state, make_train_step
from genjax.transport import (
    cosine,
    minibatch_energy_distance,
    sinkhorn_divergence,
    squared_euclidean,
)

EMA = 0.995


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
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
    """Updates in one call of the compiled program."""
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


IMAGES = {
    "variant": "learned",
    "steps": 1500,
    "batch_size": 512,
    "epsilon": 0.01,
    "latent_dim": 16,
    "width": 256,
    "learning_rate": 2e-3,
}
PLANE = {
    "variant": "fixed",
    "steps": 10_000,
    "batch_size": 256,
    "epsilon": 0.0015,
    "latent_dim": 2,
    "width": 128,
    "learning_rate": 3e-3,
}


def settled(config: Any, defaults: dict[str, Any]) -> Any:
    """Give the options that were left open their values for this kind of data."""
    left = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **left)


def main(config: Config) -> dict[str, Any]:
    """Train, sample, evaluate; returns the summary."""
    config = settled(config, PLANE if config.dataset in DENSITIES else IMAGES)
    arrays, spec = load(config.dataset, "train", data_dir=config.data_dir)
    held_out = load(config.dataset, "test", data_dir=config.data_dir)[0]["x"]
    plane = spec.levels is None
    event = tuple(spec.shape)
    size = int(np.prod(event))
    scaling = Scaling(spec.levels or 256)
    spread = float(np.std(arrays["x"])) if plane else 1.0

    generator = MLP((config.width,) * config.depth + (size,), activation=jax.nn.relu)
    critic = MLP((config.width, config.width, config.features), activation=jax.nn.leaky_relu)

    def generate(params: Any, z: jax.Array) -> jax.Array:
        out: Any = generator.apply(params, z)
        return spread * out if plane else jnp.tanh(out)

    def embed(params: Any, x: jax.Array) -> jax.Array:
        # On the sphere the learned cost is at most 4: it cannot grow without end.
        features: Any = critic.apply(params, x)
        return unit(features)

    def loss_fn(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        y = batch["x"] if plane else scaling.to_continuous(batch["x"])
        n = len(y)
        y = y.reshape(n, size)
        x = generate(params["generator"], jax.random.normal(key, (n, config.latent_dim)))
        if config.variant != "fixed":
            x, y = embed(params["critic"], x), embed(params["critic"], y)
        value, error = LOSSES[config.variant](x, y, config.epsilon, config)
        # One number for the whole batch: every example carries it, and so does their mean.
        return jnp.full((n,), value), {"marginal_error": jnp.full((n,), error)}

    key_x, key_f, key_run, key_z = jax.random.split(jax.random.key(config.seed), 4)
    params = {"generator": initialise(generator, key_x, config.latent_dim)}
    if config.variant != "fixed":
        params["critic"] = initialise(critic, key_f, size)
    optimizer = two_players(config)
    state = init_state(params, optimizer, key_run, ema_decays=(EMA,))

    @jax.jit
    def sample(params: Any, key: jax.Array) -> jax.Array:
        count = config.num_samples if plane else len(arrays["x"])
        x = generate(params["generator"], jax.random.normal(key, (count, config.latent_dim)))
        return x if plane else scaling.to_levels(x.reshape(count, *event))

    def evaluate(state: Any) -> dict[str, float]:
        scores = {}
        for name, params in {"": state.params, "ema_": state.ema_params(EMA)}.items():
            samples = np.asarray(sample(params, key_z))
            for metric, value in score(config.dataset, arrays["x"], held_out, samples).items():
                scores[name + metric] = value
        return scores

    with _run.start_run(config) as run:
        step_fn = make_train_step(
            loss_fn, optimizer, mesh=_run.mesh(config), steps_per_call=config.steps_per_call
        )
        state = _run.fit(run, state, step_fn, _run.batches(config, arrays), evaluate=evaluate)
        averaged = state.ema_params(EMA)
        samples, cost = _samples.save_samples(run, lambda: sample(averaged, key_z), evaluations=1)
        cost["parameters"] = _samples.parameter_count(averaged)
        if plane:
            sets = {"data": arrays["x"][:2000], "samples": samples[:2000]}
            _pictures.save_points(run.folder / "samples.png", sets)
        else:
            _pictures.save_grid(run.folder / "samples.png", samples[:100], high=scaling.levels - 1)
        return _run.finish(run, {"variant": config.variant, **cost, **evaluate(state)})


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
    params = jax.jit(network.init)(key, jnp.zeros((1, size)))
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


def score(dataset: str, arrays: Any, held_out: Any, samples: np.ndarray) -> dict[str, float]:
    """Modes covered and the share near a mode; for images k-NN precision and recall against the
    training set in pixel space, and the share of samples that copy a training image."""
    if dataset in DENSITIES:
        density = DENSITIES[dataset]
        if not isinstance(density, GaussianMixture):
            return {}
        near = {"means": density.means, "std": density.std}
        # A mode counts as covered from a twentieth of its share on.
        least = max(1, len(samples) // (20 * len(density.means)))
        return {
            "modes": int(modes_covered(samples, least=least, **near)),
            "share_within_3_std": float(high_quality_share(samples, **near)),
        }
    flat = [x.reshape(len(x), -1).astype(np.float32) for x in (arrays, held_out, samples)]
    precision, recall = precision_recall(flat[0], flat[2], k=3)
    return {
        "precision": float(precision),
        "recall": float(recall),
        "memorised": float(memorisation_share(*flat)),
    }


if __name__ == "__main__":
    _run.launch(main, Config)
