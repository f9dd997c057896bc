"""Autoencoders between images and the latents that a model is trained in.

One of its own is trained with that model (`own`); or a finished run has it (`taken`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import _run, _system, vae, vqvae
from experiments._codes import make_quantiser
from experiments._data import Data
from genjax.networks import GridDecoder, GridEncoder, latent_scale
from genjax.networks.layers import Norm
from genjax.numerics import sum_event
from genjax.variational import gaussian_kl, gaussian_sample


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
    """|x - decoded|_1 + kl_weight KL(q(z|x) || N(0, 1)), or + the commitment to a codebook; all
    summed over the event. weights: {"networks", "codes"}."""
    scaling, event, quantised = data.scaling(), data.spec.shape, config.latents == "vq"
    dim, channels = config.features, tuple(config.channels)
    encoder = GridEncoder(dim if quantised else 2 * dim, channels, dropout=config.dropout)
    decoder = GridDecoder(event[-1], channels[::-1], dropout=config.dropout)
    quantiser = make_quantiser(
        "vq", num_codes=config.codes, dim=dim, stages=1, levels=(), decay=0.99, commitment=0.25,
        reset=0.3,
    )  # fmt: skip
    factor = 2 ** (len(channels) - 1)
    shape = (event[0] // factor, event[1] // factor, dim)

    def init(key: jax.Array) -> Any:
        key_e, key_d = jax.random.split(key)
        z = jnp.zeros((1, *shape))
        x = jnp.zeros((1, *event))
        return {"encoder": encoder.init(key_e, x), "decoder": decoder.init(key_d, z)}

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
        y = scaling.to_continuous(x)
        z, kl = encoded(weights["networks"], key_z, y, key_e)
        values, penalty, seen = z, config.kl_weight * kl, None
        if quantised:
            values, _, penalty, seen = quantiser.apply(key_code, z, weights["codes"])
        l1 = sum_event(jnp.abs(decoded(weights["networks"], values, key_d) - y))
        return l1 + penalty, {"l1": l1 / y[0].size, "kl": kl}, seen, z

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
