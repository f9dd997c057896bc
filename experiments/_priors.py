"""Priors of a VAE's latents as parameters, log-density and samples: what `vae --prior` chooses."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from genjax import checks, flows
from genjax.networks import RealNVP
from genjax.variational import mixture_log_prob, mixture_sample, vamp_log_prob

Kind = Literal["standard", "mixture", "vamp", "flow"]


class Prior(NamedTuple):
    """`encode` is the model's encoder of data as it sees them, with its parameters closed over."""

    init: Callable[[jax.Array], Any]
    log_prob: Callable[[Any, Any, jax.Array], jax.Array]  # (params, encode, z) -> [batch], nats
    sample: Callable[[Any, Any, jax.Array, int], jax.Array]  # (params, encode, key, n) -> z


def make_prior(kind: Kind, components: int, latent: int, examples: Any) -> Prior | None:
    """The prior of that name, None for N(0, I). examples: data as the encoder sees them, at some of
    which the pseudo-inputs of "vamp" start; none where it is only traced."""
    checks.one_of("prior", kind, ("standard", "mixture", "vamp", "flow"))
    checks.integer("prior_components", components, 1)
    return None if kind == "standard" else _MAKERS[kind](components, latent, examples)


def _mixture(components: int, latent: int, examples: Any) -> Prior:
    def init(key: jax.Array) -> Any:
        means = jax.random.normal(key, (components, latent))
        zeros = jnp.zeros((components, latent))
        return {"means": means, "log_vars": zeros, "logits": jnp.zeros(components)}

    def log_prob(p: Any, encode: Any, z: jax.Array) -> jax.Array:
        return mixture_log_prob(z, p["means"], p["log_vars"], logits=p["logits"])

    def sample(p: Any, encode: Any, key: jax.Array, n: int) -> jax.Array:
        return mixture_sample(key, p["means"], p["log_vars"], n, logits=p["logits"])

    return Prior(init, log_prob, sample)


def _vamp(components: int, latent: int, examples: Any) -> Prior:
    if components > len(examples):
        raise ValueError(
            f"prior_components must be at most the {len(examples)} training examples at which "
            f"pseudo-inputs start, got {components}"
        )

    def init(key: jax.Array) -> Any:
        start = jnp.asarray(examples)[jax.random.permutation(key, len(examples))[:components]]
        return {"inputs": start, "logits": jnp.zeros(components)}

    def inside(p: Any) -> jax.Array:  # within the data's range, where the encoder was trained
        return jnp.clip(p["inputs"], -1, 1)

    def log_prob(p: Any, encode: Any, z: jax.Array) -> jax.Array:
        return vamp_log_prob(encode, inside(p), z, logits=p["logits"])

    def sample(p: Any, encode: Any, key: jax.Array, n: int) -> jax.Array:
        return mixture_sample(key, *encode(inside(p)), n, logits=p["logits"])

    return Prior(init, log_prob, sample)


def _flow(components: int, latent: int, examples: Any) -> Prior:
    """Couplings from N(0, I), as many as `components`."""
    net, base = RealNVP(components, (64, 64)), flows.normal((latent,))
    bijection = flows.Bijection(
        lambda params, z: net.apply(params, z),
        lambda params, u: net.apply(params, u, inverse=True),
    )

    def log_prob(p: Any, encode: Any, z: jax.Array) -> jax.Array:
        return flows.log_prob(bijection, base, p, z)

    def sample(p: Any, encode: Any, key: jax.Array, n: int) -> jax.Array:
        return flows.sample(bijection, base, p, key, n)

    return Prior(lambda key: net.init(key, jnp.zeros((1, latent))), log_prob, sample)


_MAKERS = {"mixture": _mixture, "vamp": _vamp, "flow": _flow}
