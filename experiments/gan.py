"""Generative adversarial networks: GAN, hinge and least squares; MLP or DCGAN; with labels or not.

    critic     minimises its side of the objective on batches of data and samples
    generator  minimises the other; conditional: p(x | label), the label goes to both networks

    python -m experiments.gan
    python -m experiments.gan --network dcgan --objective hinge --spectral
    python -m experiments.gan --conditional --condition concat
    python -m experiments.gan --dataset 25gaussians --steps 20000

Samples of the averaged generator are judged, see experiments/_judge.py; the run folder gets
samples.npy and samples.png.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _run
from experiments._data import Data, load_data
from experiments._system import Row, System, train
from genjax.adversarial import gan, hinge, least_squares, r1_penalty
from genjax.networks import MLP, DCGANCritic, DCGANGenerator, init_power, spectral_normalise

ROWS = (
    Row("gan", "GAN", images={}, plane={},
        larger={"network": "dcgan", "width": 64, "objective": "hinge", "spectral": True}),
)  # fmt: skip
OBJECTIVES = {"gan": gan, "hinge": hinge, "least_squares": least_squares}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig(_run.TrainConfig):
    """What GAN, f-GAN and WGAN share: two networks and their optimisers."""

    dataset: str = "digits"
    """digits or another image set, or a 2-D density such as 25gaussians."""
    network: Literal["mlp", "dcgan"] = "mlp"
    """Fully connected networks, or convolutions (images only, squares of base * 2^k)."""
    conditional: bool = False
    """Give the label to both networks."""
    condition: Literal["projection", "concat"] = "projection"
    """How the critic takes the label: an inner product with its features, or as an input."""
    latent_dim: int = 16
    """Dimensions of the noise."""
    width: int = 128
    """Units of a hidden layer (mlp), or channels of the widest convolution (dcgan)."""
    depth: int = 2
    """Hidden layers of each network (mlp)."""
    base: int | None = None
    """Side of the smallest feature map (dcgan; default: 2 for 8x8, 7 for 28x28, 4 for 64x64)."""
    steps: int = 5000
    batch_size: int = 64
    """Examples, and samples, in one update."""
    steps_per_call: int = 20
    n_critic: int = 1
    """Updates of the critic before each one of the generator."""
    learning_rate: float = 5e-4
    """Adam's rate for both players, falling along a cosine to a tenth."""
    beta1: float = 0.5
    """Adam's first decay."""
    beta2: float = 0.999
    """Adam's second decay."""
    ema: float = 0.998


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(AdversarialConfig):
    """Train a GAN and score its samples."""

    objective: Literal["gan", "hinge", "least_squares"] = "gan"
    """The two losses."""
    r1: float = 0.0
    """Weight gamma of the gradient penalty at real examples, gamma / 2 |grad|^2."""
    spectral: bool = False
    """Divide the critic's weights by their largest singular values."""


class Players(NamedTuple):
    """Both networks as functions; labels are None where the model has none."""

    init_critic: Callable[[jax.Array], Any]
    init_generator: Callable[[jax.Array], Any]
    score: Callable[[Any, jax.Array, Any], jax.Array]  # (params, x, label) -> scores [batch]
    generate: Callable[[Any, jax.Array, Any], jax.Array]  # (params, z, label) -> x


def main(config: Config) -> dict[str, Any]:
    """Train, sample, evaluate; returns the summary."""
    data = load_data(config)
    return train(config, build(config, data), data)


def build(config: Config, data: Data) -> System:
    """The two players with the objective of the config."""

    def penalty(score: Any, key: Any, real: Any, fake: Any) -> Any:
        return config.r1 / 2 * jnp.mean(r1_penalty(score, real)), {}

    players, objective = networks(config, data), OBJECTIVES[config.objective]
    system = saddle(config, data, players, objective, penalty if config.r1 else None)
    if not config.spectral:
        return system

    # The power vectors are what no gradient moves: the iteration goes on after each update.
    def power(vectors: Any, critic: Any, seen: Any = None) -> Any:
        return spectral_normalise(critic, vectors)[1]

    def init_carry(key: jax.Array, params: Any) -> Any:
        start = init_power(params["critic"], key)
        return power(start, params["critic"])

    return system._replace(init_carry=init_carry, absorb=(power, None))


def networks(config: AdversarialConfig, data: Data) -> Players:
    """Both networks for a data set."""
    if config.network == "dcgan":
        if data.kind == "points":
            name = data.spec.name
            raise ValueError(f"network must be mlp for points in the plane ({name!r})")
        return convolutions(config, data)
    return perceptrons(config, data)


def convolutions(config: AdversarialConfig, data: Data) -> Players:
    """DCGAN's pair."""
    height, _, channels = data.spec.shape
    base = config.base or smallest_side(height)
    sizes = {
        "size": height,
        "channels": channels,
        "width": max(config.width // 2 ** (int(np.log2(height / base)) - 1), 1),
        "base": base,
        "classes": classes_of(config, data),
    }
    critic = DCGANCritic(condition=config.condition, **sizes)
    generator = DCGANGenerator(**sizes)
    return players_of(config, data, critic, generator)


def players_of(config: AdversarialConfig, data: Data, critic: Any, generator: Any) -> Players:
    """The players of two modules that take labels beside images, and beside noise."""
    z, x = jnp.zeros((1, config.latent_dim)), jnp.zeros((1, *data.spec.shape))
    label = jnp.zeros(1, jnp.int32) if config.conditional else None
    return Players(
        lambda key: critic.init(key, x, label),
        lambda key: generator.init(key, z, label),
        critic.apply,
        generator.apply,
    )


def classes_of(config: AdversarialConfig, data: Data) -> int | None:
    """Classes that the networks take; raises ValueError where the data have no labels."""
    if config.conditional and data.spec.classes is None:
        raise ValueError(f"conditional needs labels, which the data set {data.spec.name!r} has not")
    return data.spec.classes if config.conditional else None


def smallest_side(height: int) -> int:
    """The side from which doublings reach the image's: at least 4 from 16 pixels on, else 2."""
    side, least = height, 4 if height >= 16 else 2
    while side % 2 == 0 and side // 2 >= least:
        side //= 2
    return side


def perceptrons(config: AdversarialConfig, data: Data) -> Players:
    """Fully connected networks: images in (-1, 1), points on their own scale."""
    plane, event = data.kind == "points", data.spec.shape
    size, spread = math.prod(event), 4.0 if plane else 1.0
    classes = classes_of(config, data) or 0
    joined = classes if config.condition == "concat" else 0
    # One output for each class: <w_label, features>, the projection critic.
    outputs = 1 + classes - joined
    hidden = (config.width,) * config.depth
    critic = MLP((*hidden, outputs), activation=leaky)
    generator = MLP((*hidden, size), activation=jax.nn.relu)

    def score(params: Any, x: jax.Array, label: Any) -> jax.Array:
        flat = x.reshape(len(x), -1) / spread
        if joined:
            flat = jnp.concatenate([flat, jax.nn.one_hot(label, classes)], axis=1)
        out = critic.apply(params, flat)
        if outputs == 1:
            return out[:, 0]
        return out[:, 0] + jnp.take_along_axis(out[:, 1:], label[:, None], axis=1)[:, 0]

    def generate(params: Any, z: jax.Array, label: Any) -> jax.Array:
        if classes:
            z = jnp.concatenate([z, jax.nn.one_hot(label, classes)], axis=1)
        out = generator.apply(params, z).reshape(len(z), *event)
        return spread * out if plane else jnp.tanh(out)

    inputs, noise = jnp.zeros((1, size + joined)), jnp.zeros((1, config.latent_dim + classes))
    return Players(
        lambda key: critic.init(key, inputs),
        lambda key: generator.init(key, noise),
        score,
        generate,
    )


def leaky(x: jax.Array) -> jax.Array:
    """Leaky ReLU with DCGAN's slope."""
    return jax.nn.leaky_relu(x, 0.2)


def saddle(
    config: AdversarialConfig,
    data: Data,
    players: Players,
    objective: Callable[[jax.Array, jax.Array], Any],
    penalty: Callable[..., Any] | None = None,
    *,
    project: Callable[[Any], Any] | None = None,
) -> System:
    """The two players under an objective, with their optimisers.

    penalty(score, key, real, fake) gives what is added to the critic's loss, and terms to log.
    """
    scaling = data.scaling()

    def real_and_fake(generator: Any, key: Any, batch: Any) -> tuple[Any, Any, Any]:
        label = batch["label"] if config.conditional else None
        real = scaling.to_continuous(batch["x"])
        z = jax.random.normal(jax.random.fold_in(key, 0), (len(real), config.latent_dim))
        return real, players.generate(generator, z, label), label

    def scores(critic: Any, label: Any, power: Any) -> Callable[[jax.Array], jax.Array]:
        """The critic; with `power` its weights are divided by their largest singular values."""
        weights = spectral_normalise(critic, *power)[0] if power else critic
        return lambda x: players.score(weights, x, label)

    def critic_loss(critic: Any, generator: Any, key: Any, batch: Any, *power: Any) -> Any:
        real, fake, label = real_and_fake(generator, key, batch)
        score = scores(critic, label, power)
        losses = objective(score(real), score(fake))
        total, terms = losses.critic, {"bound": losses.bound}
        if penalty is not None:
            more, found = penalty(score, jax.random.fold_in(key, 1), real, fake)
            total, terms = total + more, terms | found
        return total, terms, *(None for _ in power)

    def generator_loss(critic: Any, generator: Any, key: Any, batch: Any, *power: Any) -> Any:
        _, fake, label = real_and_fake(generator, key, batch)
        fooled = scores(critic, label, power)(fake)
        return objective(fooled, fooled).generator, {}, *(None for _ in power)

    system = two_players(config, data, players, critic_loss, generator_loss)
    return system._replace(step_options={**system.step_options, "project": project})


def two_players(
    config: AdversarialConfig,
    data: Data,
    players: Players,
    critic_loss: Callable[..., Any],
    generator_loss: Callable[..., Any],
) -> System:
    """The system of two losses: Adam for both players, and samples of noise [n, latent_dim]."""
    scaling = data.scaling()

    def adam(updates: int) -> optax.GradientTransformation:
        rate = optax.cosine_decay_schedule(config.learning_rate, updates, alpha=0.1)
        return optax.adam(rate, b1=config.beta1, b2=config.beta2)

    def init(key: jax.Array) -> Any:
        key_c, key_g = jax.random.split(key)
        return {"critic": players.init_critic(key_c), "generator": players.init_generator(key_g)}

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        z = jax.random.normal(key, (n, config.latent_dim))
        return scaling.to_levels(players.generate(params, z, label))

    return System(
        init,
        (critic_loss, generator_loss),
        (adam(config.steps * config.n_critic), adam(config.steps)),
        sample,
        labels=data.labels() if config.conditional else None,
        step_options={"n_critic": config.n_critic},
    )


if __name__ == "__main__":
    _run.launch(main, Config)
