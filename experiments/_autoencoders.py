"""Autoencoders between images and the latents that a model is trained in.

One of its own is trained with that model (`own`); or a finished run has it (`taken`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from experiments import _run, _system, vae, vqvae
from experiments._codes import make_quantiser
from experiments._data import Data
from genjax import adversarial, checks
from genjax.metrics import feature_extractor
from genjax.metrics.extractors import SHIPPED
from genjax.networks import (
    GridDecoder,
    GridEncoder,
    PatchCritic,
    adaptive_weight,
    latent_scale,
    perceptual_distance,
)
from genjax.networks.layers import Norm
from genjax.numerics import sum_event
from genjax.variational import gaussian_kl, gaussian_sample

LAST = "Conv_1"  # the decoder's last layer, by whose gradients the critic is weighted


class Autoencoder(NamedTuple):
    """weights: all that both maps read. Latents are as the encoder gives them, not scaled."""

    shape: tuple[int, ...]  # of one example's latents
    encode: Callable[..., jax.Array]  # (weights, key, x) -> z, x levels
    decode: Callable[..., jax.Array]  # (weights, key, z) -> levels
    weights: Any = None  # of a finished run
    latents: Any = None  # their shift and scale: as that run stored them, or measured


class Own(NamedTuple):
    """An autoencoder that is trained; `codes` is what its quantiser carries, or None."""

    maps: Autoencoder
    init: Callable[[Any], Any]  # key -> networks
    start: Callable[..., Any]  # (key, networks, x) -> codes
    loss: Callable[..., Any]  # (weights, key, x) -> losses [batch], terms, seen of codes, z
    absorb: Callable[..., Any]  # (codes, seen) -> codes


def own(config: Any, data: Data) -> Own:
    """|x - decoded|_1 + kl_weight KL(q(z|x) || N(0, 1)), or + the commitment to a codebook, all
    summed over the event; + perceptual distance; + a patch critic, which is trained in the same
    step. weights: {"networks", "codes"}."""
    scaling, event, quantised = data.scaling(), data.spec.shape, config.latents == "vq"
    dim, channels = config.features, tuple(config.channels)
    encoder = GridEncoder(dim if quantised else 2 * dim, channels, dropout=config.dropout)
    decoder = GridDecoder(event[-1], channels[::-1], dropout=config.dropout)
    critic, distance = PatchCritic((16, 32)), perceptual(config, data)
    quantiser = make_quantiser(
        "vq", num_codes=config.codes, dim=dim, stages=1, levels=(), decay=0.99, commitment=0.25,
        reset=0.3,
    )  # fmt: skip
    factor = 2 ** (len(channels) - 1)
    shape = (event[0] // factor, event[1] // factor, dim)

    def init(key: jax.Array) -> Any:
        key_e, key_d, key_c = jax.random.split(key, 3)
        z = jnp.zeros((1, *shape))
        x = jnp.zeros((1, *event))
        made = {"encoder": encoder.init(key_e, x), "decoder": decoder.init(key_d, z)}
        return made | ({"critic": critic.init(key_c, x)} if config.critic else {})

    def encoded(networks: Any, key: Any, y: jax.Array, key_drop: Any = None) -> Any:
        """z and its divergence from N(0, 1); the latents of a codebook are of one size."""
        h: Any = encoder.apply(networks["encoder"], y, dropout_key=key_drop)
        if quantised:
            return Norm("rms", use_scale=False).apply({}, h), jnp.zeros(len(y))
        mean, log_var = jnp.split(h, 2, axis=-1)
        log_var = jnp.clip(log_var, -20, 10)
        return gaussian_sample(key, mean, log_var), gaussian_kl(mean, log_var)

    def decoded(networks: Any, z: jax.Array, key_drop: Any = None) -> Any:
        return decoder.apply(networks["decoder"], z, dropout_key=key_drop)

    def loss(weights: Any, key: Any, x: jax.Array) -> Any:
        key_z, key_code, key_e, key_d = jax.random.split(key, 4)
        y, networks = scaling.to_continuous(x), weights["networks"]
        z, kl = encoded(networks, key_z, y, key_e)
        values, penalty, seen = z, config.kl_weight * kl, None
        if quantised:
            values, _, penalty, seen, _ = quantiser.apply(key_code, z, weights["codes"])
        l1 = lambda image: sum_event(jnp.abs(image - y))  # noqa: E731
        error = lambda image: l1(image) + distance(image, y)  # noqa: E731
        image = decoded(networks, values, key_d)
        losses = error(image) + penalty
        terms = {"l1": l1(image) / y[0].size, "kl": kl}
        if config.critic:
            held = stop_gradient(values)
            decode = lambda params: decoded({"decoder": params}, held, key_d)  # noqa: E731
            more, found = critic_loss(config, critic, networks, decode, error, y, image)
            losses, terms = losses + more, terms | found
        return losses, terms, seen, z

    def encode(weights: Any, key: Any, x: jax.Array) -> jax.Array:
        return encoded(weights["networks"], key, scaling.to_continuous(x))[0]

    def decode(weights: Any, key: Any, z: jax.Array) -> jax.Array:
        if quantised:
            z = quantiser.apply(key, z, weights["codes"]).values
        return scaling.to_levels(decoded(weights["networks"], z))

    def start(key: Any, networks: Any, x: jax.Array) -> Any:
        if not quantised:
            return None
        return quantiser.start(key, encoded(networks, None, scaling.to_continuous(x))[0])

    def absorb(codes: Any, seen: Any) -> Any:
        return quantiser.absorb(codes, seen, config.batch_size) if quantised else None

    return Own(Autoencoder(shape, encode, decode), init, start, loss, absorb)


def critic_loss(
    config: Any, critic: Any, networks: Any, decode: Any, error: Any, y: jax.Array, image: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Hinge loss of the patch critic, and of the decoder its scores times the adaptive weight.

    decode: decoder's parameters -> image; error: image -> the losses that the weight compares.
    """
    hinge = lambda params, fake: adversarial.hinge(  # noqa: E731
        *(critic.apply(params, x).ravel() for x in (y, fake))
    )
    fooled = lambda image: hinge(stop_gradient(networks["critic"]), image).generator  # noqa: E731
    layers = stop_gradient(networks["decoder"]["params"])

    def by_last(loss: Any) -> Any:
        """The gradient of a mean loss for the decoder's last layer."""
        moved = lambda last: jnp.mean(loss(decode({"params": {**layers, LAST: last}})))  # noqa: E731
        return jax.grad(moved)(layers[LAST])

    weight = config.critic * adaptive_weight(by_last(error), by_last(fooled))
    own_loss = hinge(networks["critic"], stop_gradient(image)).critic
    return weight * fooled(image) + own_loss, {"critic": own_loss, "critic_weight": weight}


def perceptual(config: Any, data: Data) -> Callable[[jax.Array, jax.Array], Any]:
    """`perceptual_distance` on the maps of a trained network, times the weight and the numbers of
    an image: a distance of 1 counts as an absolute error of 1 everywhere."""
    if not config.perceptual:
        return lambda x, y: 0.0
    if config.feature_network is None:
        checks.one_of("dataset without --feature-network", data.spec.name, SHIPPED)
    maps: Any = feature_extractor(data.spec.name, path=config.feature_network).maps
    return lambda x, y: config.perceptual * x[0].size * perceptual_distance(maps, x, y)


def taken(folder: str, data: Data, dataset: str) -> Autoencoder:
    """That of a finished run of `latent`, `vae` or `vqvae` (one level, a codebook), its latents
    scaled as that run stored it, else as 2,000 training images are.

    Raises RunError for a run of another kind, of another data set, or without its latents' scale.
    """
    stored = _run.read_config(Path(folder) / "config.json", "give a run's folder")
    kind = str(stored.get("experiment")).rpartition(".")[2]
    if kind not in ("latent", "vae", "vqvae"):
        raise _run.RunError(f"autoencoder must be a run of latent, vae or vqvae, got {folder}")
    if stored.get("dataset") != dataset:
        raise _run.RunError(
            f"autoencoder {folder} is of the data set {stored.get('dataset')!r}, got {dataset!r}"
        )
    _, params, found = _system.reopen(folder)
    if kind == "latent":
        before = found.autoencoder
        maps = own(found, data).maps if before is None else taken(before, data, dataset)
        return maps._replace(weights=params["autoencoder"], latents=params["latents"])
    maps = _of_vae(found, data) if kind == "vae" else _of_vqvae(found, data)
    x = jnp.asarray(data.train["x"][:2000])
    z = jax.jit(maps.encode)(params, jax.random.key(0), x)
    latents = {"shift": jnp.mean(z), "scale": latent_scale(z)}
    return maps._replace(shape=z.shape[1:], weights=params, latents=latents)


def _of_vae(config: Any, data: Data) -> Autoencoder:
    model = vae.make_model(config, data.spec, data.train["x"])

    def encode(weights: Any, key: Any, x: jax.Array) -> jax.Array:
        return gaussian_sample(key, *model.encode(weights, x))

    def decode(weights: Any, key: Any, z: jax.Array) -> jax.Array:
        return model.law.sample(key, model.decode(weights, z))

    return Autoencoder((), encode, decode)


def _of_vqvae(config: Any, data: Data) -> Autoencoder:
    """Latents are the codebooks' vectors; what is decoded is rounded to them again."""
    if config.levels != 1 or config.quantiser not in ("vq", "residual"):
        raise _run.RunError(
            "autoencoder must have one level and a codebook (vq, residual), "
            f"got levels {config.levels} and quantiser {config.quantiser!r}"
        )
    model = vqvae.make_model(config, data)

    def encode(weights: Any, key: Any, x: jax.Array) -> jax.Array:
        return model.encode(weights, weights["carried"], None, x)[0].values

    def decode(weights: Any, key: Any, z: jax.Array) -> jax.Array:
        key_code, key_x = jax.random.split(key)
        values = model.quantiser.apply(key_code, z, weights["carried"][0]).values
        return model.draw(key_x, model.decode(weights, [values], None))

    return Autoencoder((), encode, decode)
