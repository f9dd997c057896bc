"""Image GANs at the front: R3GAN and StyleGAN2.

    r3gan      critic     mean softplus(-(D(x) - D(y))) + gamma / 2 (R1 + R2)
               generator  mean softplus(-(D(y) - D(x))), x real and y generated, row by row
    stylegan2  critic     GAN's loss + gamma / 2 R1 in every 16th step, times 16
               generator  GAN's loss + 2 (path length - its mean)^2 in every 4th step, times 4

    python -m experiments.stylegan
    python -m experiments.stylegan --network mlp --width 128 --latent-dim 16
    python -m experiments.stylegan --dataset mnist_5k --batch-size 32
    python -m experiments.stylegan --network stylegan2 --augment
    python -m experiments.stylegan --network stylegan2 --dataset mnist_5k --conditional \
        --batch-size 32 --learning-rate 2.5e-3 --gamma 0.1 --path 0.2 --mixing 0.5 --mapping-depth 2
    python -m experiments.stylegan --network mlp --dataset 25gaussians

Samples of the averaged generator are judged, see experiments/_judge.py.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from experiments import _run, gan
from experiments._data import Data, load_data
from experiments._system import Row, System, train
from experiments.gan import AdversarialConfig, Players
from genjax import adversarial as ga
from genjax import checks
from genjax.networks import R3GANCritic, R3GANGenerator, StyleCritic, StyleGenerator

ROWS = (
    Row("r3gan", "R3GAN", {"network": "mlp", "width": 128, "latent_dim": 16}, {"network": "mlp"},
        larger={}),
    Row("stylegan2", "StyleGAN2", {"network": "stylegan2", "learning_rate": 2e-3}),
)  # fmt: skip
R1_EVERY, PATH_EVERY, ADA_EVERY = 16, 4, 4  # steps between the lazy terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(AdversarialConfig):
    """Train R3GAN or StyleGAN2 and score its samples."""

    evaluation: ClassVar = ("truncation",)

    network: Literal["r3gan", "stylegan2", "mlp"] = "r3gan"
    """Residual blocks with grouped convolutions, or StyleGAN2's pair with its losses, or fully
    connected networks (any data)."""
    gamma: float | None = None
    """Weight of the gradient penalties (default: 1; stylegan2: 0.0002 pixels / batch)."""
    path: float = 2.0
    """Weight of the path lengths' penalty (stylegan2)."""
    mixing: float = 0.9
    """Share of examples with two styles (stylegan2)."""
    mapping_depth: int = 8
    """Layers from the noise to the styles, learnt at a hundredth of the rate: eight leave the first
    styles alike, which a short training does not undo, and two do less (stylegan2)."""
    augment: bool = False
    """Change real and generated images alike, as often as ADA's controller says (stylegan2)."""
    truncation: float = 1.0
    """Samples' styles: mean + truncation * (style - mean) (stylegan2)."""
    width: int = 64
    """Channels of the smallest feature map, halved at each doubling, at least 8 (mlp: hidden
    units)."""
    groups: int = 8
    """Groups of a convolution (r3gan)."""
    base: int = 0
    """Side of the smallest feature map (0: from 4 to 7, by halving the images)."""
    latent_dim: int = 32
    """Dimensions of the noise."""
    learning_rate: float = 1e-3
    """Adam's rate for both players, falling along a cosine to a tenth."""
    beta1: float = 0.0
    beta2: float = 0.99


def main(config: Config) -> dict[str, Any]:
    """Train, sample, evaluate; returns the summary."""
    data = load_data(config)
    return train(config, build(config, data), data)


def build(config: Config, data: Data) -> System:
    """The two players with the losses of the network."""
    if config.network != "mlp" and config.condition != "projection":
        raise ValueError(f"condition must be projection, got {config.condition!r} (mlp takes both)")
    return stylegan2(config, data) if config.network == "stylegan2" else r3gan(config, data)


def r3gan(config: Config, data: Data) -> System:
    """Relativistic pairs with both penalties in every step."""
    gamma = 1.0 if config.gamma is None else config.gamma
    players, scaling = networks(config, data), data.scaling()

    def real_and_fake(generator: Any, key: Any, batch: Any) -> tuple[Any, Any, Any]:
        label = batch["label"] if config.conditional else None
        real = scaling.to_continuous(batch["x"])
        z = jax.random.normal(key, (len(real), config.latent_dim))
        return real, players.generate(generator, z, label), label

    def critic_loss(critic: Any, generator: Any, key: Any, batch: Any) -> Any:
        real, fake, label = real_and_fake(generator, key, batch)
        fake = stop_gradient(fake)
        score = lambda x: players.score(critic, x, label)  # noqa: E731
        losses = ga.relativistic(score(real), score(fake))
        r1, r2 = ga.r1_penalty(score, real), ga.r2_penalty(score, fake)
        total = losses.critic + gamma / 2 * (jnp.mean(r1) + jnp.mean(r2))
        return total, {"bound": losses.bound, "r1": r1, "r2": r2}

    def generator_loss(critic: Any, generator: Any, key: Any, batch: Any) -> Any:
        real, fake, label = real_and_fake(generator, key, batch)
        scores = (players.score(critic, x, label) for x in (real, fake))
        return ga.relativistic(*scores).generator, {}

    return gan.two_players(config, data, players, critic_loss, generator_loss)


def stylegan2(config: Config, data: Data) -> System:
    """Logistic losses with their lazy terms; the carry has what they remember."""
    critic, generator, scaling = *style_networks(config, data), data.scaling()
    height, batch = data.spec.shape[0], config.batch_size
    gamma = 0.0002 * height**2 / batch if config.gamma is None else config.gamma
    layers = generator.num_layers
    labels = lambda batch: batch["label"] if config.conditional else None  # noqa: E731

    def make_styles(params: Any, key: Any, n: int, label: Any) -> tuple[jax.Array, jax.Array]:
        z = jax.random.normal(jax.random.fold_in(key, 0), (2, n, config.latent_dim))
        first, second = (generator.apply(params, part, label, method="mapping") for part in z)
        mixed = ga.mix_styles(
            jax.random.fold_in(key, 1), first, second, layers=layers, probability=config.mixing
        )
        return first, mixed

    def make_images(params: Any, key: Any, w: jax.Array) -> jax.Array:
        noise = generator.draw_noise(jax.random.fold_in(key, 2), len(w))
        return generator.apply(params, w, noise, method="synthesis")

    def seen_as(key: Any, x: jax.Array, carry: Any) -> jax.Array:
        return ga.augment(key, x, p=carry["p"]) if config.augment else x

    def critic_loss(params: Any, opponent: Any, key: Any, batch: Any, carry: Any) -> Any:
        real, label = scaling.to_continuous(batch["x"]), labels(batch)
        _, w = make_styles(opponent, key, len(real), label)
        keys = (jax.random.fold_in(key, i) for i in (3, 4))
        fake = stop_gradient(make_images(opponent, key, w))
        real, fake = (seen_as(k, x, carry) for k, x in zip(keys, (real, fake), strict=True))
        score = lambda x: critic.apply(params, x, label)  # noqa: E731
        scores = score(real)
        losses = ga.gan(scores, score(fake))
        r1 = ga.every_nth(carry["step"], R1_EVERY, lambda: jnp.mean(ga.r1_penalty(score, real)))
        terms = {"bound": losses.bound, "r1": r1, "p": carry["p"]}
        return losses.critic + gamma / 2 * r1, terms, {"sure": jnp.mean(jnp.sign(scores))}

    def generator_loss(opponent: Any, params: Any, key: Any, batch: Any, carry: Any) -> Any:
        n, label = len(batch["x"]), labels(batch)
        first, w = make_styles(params, key, n, label)
        fake = seen_as(jax.random.fold_in(key, 4), make_images(params, key, w), carry)
        scores = critic.apply(opponent, fake, label)

        def lengths() -> jax.Array:
            part = w[: max(n // 2, 1)]
            noise = jax.random.normal(jax.random.fold_in(key, 5), (len(part), *data.spec.shape))
            make = lambda w: make_images(params, key, w)  # noqa: E731
            # The mean of all lengths so far at first: one that rises from 0 pulls them down.
            decay = jnp.maximum(0.01, 1 / (1 + carry["step"] // PATH_EVERY))
            found = ga.path_length_penalty(make, part, noise, mean=carry["path"], decay=decay)
            return jnp.stack([jnp.mean(found.penalties), found.mean])

        found = ga.every_nth(carry["step"], PATH_EVERY, lengths)
        total = ga.gan(scores, scores).generator + config.path * found[0]
        seen = {"path": stop_gradient(found[1]) / PATH_EVERY, "w": jnp.mean(first, axis=0)}
        return total, {"path": carry["path"], "path_penalty": found[0]}, stop_gradient(seen)

    def init(key: jax.Array) -> Any:
        key_c, key_g, key_n = jax.random.split(key, 3)
        x, z = jnp.zeros((critic.group or 1, *data.spec.shape)), jnp.zeros((1, config.latent_dim))
        made = generator.init(key_g, z, None, generator.draw_noise(key_n, 1))
        return {"critic": critic.init(key_c, x), "generator": made}

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        z = jax.random.normal(jax.random.fold_in(key, 0), (n, config.latent_dim))
        w = generator.apply(params["network"], z, label, method="mapping")
        w = ga.truncate(w, params["mean"], config.truncation)
        w = jnp.repeat(w[:, None], layers, axis=1)
        return scaling.to_levels(make_images(params["network"], key, w))

    return System(
        init,
        (critic_loss, generator_loss),
        (lazy_adam(config, R1_EVERY), lazy_adam(config, PATH_EVERY)),
        sample,
        labels=data.labels() if config.conditional else None,
        init_carry=lambda key, params: remembered(config),
        absorb=(partial(after_critic, config), after_generator),
        merge_carry=lambda params, carry: {"network": params, "mean": carry["w"]},
    )


def remembered(config: Config) -> dict[str, jax.Array]:
    """The carry at the start: the step, the mean path length, ADA's p, the mean style."""
    zero = jnp.zeros(())
    w = jnp.zeros(config.latent_dim)
    return {"step": jnp.zeros((), jnp.int32), "path": zero, "p": zero, "w": w}


def after_critic(config: Config, carry: Any, params: Any, seen: Any) -> Any:
    """ADA's controller in every 4th step."""
    seen_images = jnp.asarray(ADA_EVERY * config.batch_size, jnp.float32)
    p = ga.ada_update(carry["p"], sure=seen["sure"], images=seen_images)
    return {**carry, "p": jnp.where(carry["step"] % ADA_EVERY == 0, p, carry["p"])}


def after_generator(carry: Any, params: Any, seen: Any) -> Any:
    """The means of path lengths and of styles, and the step."""
    due = carry["step"] % PATH_EVERY == 0
    path = jnp.where(due, seen["path"], carry["path"])
    w = ga.mean_style(carry["w"], seen["w"][None])
    return {**carry, "path": path, "w": w, "step": carry["step"] + 1}


def lazy_adam(config: Config, every: int) -> optax.GradientTransformation:
    """Adam slowed down by c = every / (every + 1) for a term in every so many steps."""
    c = every / (every + 1)
    rate = optax.cosine_decay_schedule(c * config.learning_rate, config.steps, alpha=0.1)
    return optax.adam(rate, b1=config.beta1**c, b2=config.beta2**c)


def style_networks(config: Config, data: Data) -> tuple[StyleCritic, StyleGenerator]:
    """StyleGAN2's pair for a data set."""
    if config.n_critic != 1:
        raise ValueError(f"n_critic must be 1 with stylegan2, got {config.n_critic}")
    checks.integer("mapping_depth", config.mapping_depth, 1)
    height, base, widths = sizes(config, data)
    shared = {
        "size": height,
        "channels": data.spec.shape[-1],
        "base": base,
        "classes": gan.classes_of(config, data),
    }
    generator = StyleGenerator(
        widths=widths, latent=config.latent_dim, depth=config.mapping_depth, **shared
    )
    return StyleCritic(widths=widths[::-1], group=4, **shared), generator


def networks(config: Config, data: Data) -> Players:
    """Both networks for a data set."""
    if config.network == "mlp":
        return gan.perceptrons(config, data)
    height, base, widths = sizes(config, data)
    shared = {
        "size": height,
        "channels": data.spec.shape[-1],
        "base": base,
        "groups": config.groups,
        "classes": gan.classes_of(config, data),
    }
    critic = R3GANCritic(widths=widths[::-1], **shared)
    generator = R3GANGenerator(widths=widths, **shared)
    return gan.players_of(config, data, critic, generator)


def sizes(config: Config, data: Data) -> tuple[int, int, tuple[int, ...]]:
    """Side of the images, of the smallest feature map, and channels from that one up."""
    data.require("images")
    height, width, _ = data.spec.shape
    if height != width:
        raise ValueError(f"images must be square, got {height} by {width}")
    base = config.base or smallest(height)
    doublings = max((height // base).bit_length() - 1, 0)
    return height, base, tuple(max(config.width >> i, 8) for i in range(doublings + 1))


def smallest(size: int) -> int:
    """The side that halving leaves while it stays at least 4: 4 of 8, 7 of 28."""
    while size % 2 == 0 and size >= 8:
        size //= 2
    return size


if __name__ == "__main__":
    _run.launch(main, Config)
