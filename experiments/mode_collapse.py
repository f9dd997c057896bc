"""Mode collapse, measured: 64 seeds of each objective on the 25 Gaussians, trained in one call.

A whole training run is one function of its key, so `vmap` trains all seeds at once. Counted for
each seed: the modes with at least one sample (of 2,500) within three standard deviations, as in
VEEGAN, and more strictly those with a tenth of their fair share; the share of such samples; the
reverse KL from the shares of the modes to equal ones.

    python -m experiments.mode_collapse
    python -m experiments.mode_collapse --objectives gan hinge wgan_gp --seeds 16

The run folder gets modes.png (how many seeds cover how many modes), samples.png and samples.npz.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _judge, _pictures, _run
from genjax import checks
from genjax.adversarial import (
    clip_weights,
    gan,
    gradient_penalty,
    hinge,
    least_squares,
    wasserstein,
)
from genjax.data.synthetic import DENSITIES, GaussianMixture
from genjax.metrics import high_quality_share, modes_covered, reverse_kl_modes
from genjax.networks import MLP
from genjax.training import init_saddle_state, saddle_step, train_scan

LOSSES = {
    "gan": gan,
    "gan_saturating": partial(gan, saturating=True),
    "hinge": hinge,
    "least_squares": least_squares,
    "wgan_clip": wasserstein,
    "wgan_gp": wasserstein,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Train many seeds of several objectives and count modes."""

    dataset: str = "25gaussians"
    """A 2-D mixture of equal Gaussians."""
    objectives: tuple[str, ...] = ("gan", "wgan_gp")
    """Names in LOSSES: gan, gan_saturating, hinge, least_squares, wgan_clip, wgan_gp."""
    seeds: int = 64
    """Runs of each objective."""
    steps: int = 4000
    """Updates of the generator."""
    batch_size: int = 64
    """Examples, and samples, in one update."""
    n_critic: int = 2
    """Updates of the critic before each one of the generator (Wasserstein objectives)."""
    width: int = 32
    """Units of a hidden layer."""
    depth: int = 3
    """Hidden layers of each network."""
    latent_dim: int = 2
    """Dimensions of the noise."""
    learning_rate: float = 5e-3
    """Adam's rate for both players, falling along a cosine to nothing."""
    penalty: float = 0.1
    """Weight of the gradient penalty."""
    limit: float = 0.05
    """Largest weight of a clipped critic."""
    num_samples: int = 2500
    """Samples of each seed that are counted."""
    strict: int = 10
    """Samples that a mode needs in the stricter count."""


def main(config: Config) -> dict[str, Any]:
    """Train, count, draw; returns the summary."""
    for name in config.objectives:
        checks.one_of("objectives", name, LOSSES)
    checks.one_of("dataset", config.dataset, filter(_judge.few_modes, DENSITIES))
    density = DENSITIES[config.dataset]
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    with _run.start_run(config) as run:
        summary: dict[str, Any] = {"modes_of_the_law": len(density.means)}
        counts, kept = {}, {}
        for name in config.objectives:
            begun = time.monotonic()
            many = jax.jit(jax.vmap(make_train(config, density, name)))
            result = jax.tree.map(np.asarray, many(keys))
            counts[name] = result["modes"]
            kept[name] = result["samples"]
            summary[name] = count(result, len(density.means))
            summary[name]["seconds"] = round(time.monotonic() - begun, 1)
            print(f"{name}: {summary[name]}")
        np.savez(run.folder / "samples.npz", **{n: x[:8] for n, x in kept.items()})
        shown = {n: x[0] for n, x in kept.items()}
        title = f"samples of the first seed, {config.dataset}"
        _pictures.save_points(run.folder / "samples.png", shown, title=title)
        plot(run.folder / "modes.png", counts, len(density.means))
        return _run.finish(run, summary)


def make_train(config: Config, density: GaussianMixture, name: str) -> Callable[[Any], Any]:
    """A whole training run and its score, as one function of a key."""
    loss = LOSSES[name]
    n, n_critic = config.batch_size, config.n_critic if name.startswith("wgan") else 1
    hidden = (config.width,) * config.depth
    critic, generator = (MLP((*hidden, out), activation=jax.nn.relu) for out in (1, 2))
    spread = float(np.std(density.means))

    def score(params: Any, x: jax.Array) -> jax.Array:
        return critic.apply(params, x / spread)[:, 0]

    def generate(params: Any, key: jax.Array, count: int) -> jax.Array:
        return spread * generator.apply(params, jax.random.normal(key, (count, config.latent_dim)))

    def critic_loss(params: Any, other: Any, key: Any, real: Any) -> Any:
        key_z, key_e = jax.random.split(key)
        fake = generate(other, key_z, n)
        value = loss(score(params, real), score(params, fake)).critic
        if name == "wgan_gp":
            # The gradient by x / spread: the units in which the networks live.
            penalty = gradient_penalty(
                lambda x: score(params, x), key_e, real, fake, target=1 / spread
            )
            value = value + config.penalty * spread**2 * jnp.mean(penalty)
        return value, {}

    def generator_loss(params: Any, own: Any, key: Any, real: Any) -> Any:
        scores = score(params, generate(own, key, n))
        return loss(scores, scores).generator, {}

    def adam(updates: int) -> optax.GradientTransformation:
        rate = optax.cosine_decay_schedule(config.learning_rate, updates)
        decays = (0.0, 0.9) if name.startswith("wgan") else (0.5, 0.999)
        return optax.adam(rate, b1=decays[0], b2=decays[1])

    optimizers = adam(config.steps * n_critic), adam(config.steps)
    project = partial(clip_weights, limit=config.limit) if name == "wgan_clip" else None
    step = partial(
        saddle_step, critic_loss, generator_loss, *optimizers, n_critic=n_critic, project=project
    )

    def train(key: jax.Array) -> dict[str, jax.Array]:
        key_c, key_g, key_run, key_z = jax.random.split(key, 4)
        state = init_saddle_state(
            critic.init(key_c, jnp.zeros((1, 2))),
            generator.init(key_g, jnp.zeros((1, config.latent_dim))),
            *optimizers,
            key_run,
        )
        sample = lambda key: density.sample(key, n_critic * n).reshape(n_critic, n, 2)  # noqa: E731
        state, _ = train_scan(step, state, sample, num_steps=config.steps)
        samples = generate(state.generator.params, key_z, config.num_samples)
        near = (samples, jnp.asarray(density.means, jnp.float32), density.std)
        return {
            "samples": samples,
            "modes": modes_covered(*near),
            "modes_strictly": modes_covered(*near, least=config.strict),
            "high_quality_share": high_quality_share(*near),
            "reverse_kl_modes": reverse_kl_modes(*near[:2]),
        }

    return train


def count(result: Any, modes: int) -> dict[str, Any]:
    """Sum up the seeds of one objective."""
    covered, strictly = result["modes"], result["modes_strictly"]
    return {
        "seeds_covering_all": float(np.mean(covered == modes)),
        "seeds_covering_all_strictly": float(np.mean(strictly == modes)),
        "median_modes": float(np.median(covered)),
        "fewest_modes": int(np.min(covered)),
        "median_modes_strictly": float(np.median(strictly)),
        "high_quality_share": float(np.mean(result["high_quality_share"])),
        "reverse_kl_modes": float(np.mean(result["reverse_kl_modes"])),
        "modes_by_seed": covered.tolist(),
        "modes_by_seed_strictly": strictly.tolist(),
    }


def plot(path: Any, counts: dict[str, np.ndarray], modes: int) -> None:
    """Draw for each objective how many seeds cover how many modes."""

    def bars(axes: Any) -> None:
        for axis, (name, covered) in zip(axes, counts.items(), strict=True):
            axis.hist(covered, bins=np.arange(modes + 2) - 0.5)
            axis.set(title=name, xlabel="modes covered", ylabel="seeds", xlim=(-0.5, modes + 0.5))

    title = "modes that the generators cover"
    _pictures.save_figure(path, bars, title=title, panels=len(counts))


if __name__ == "__main__":
    _run.launch(main, Config)
