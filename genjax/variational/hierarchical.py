"""Latent variables in levels: bounds, samples, free nats and balancing.

Level 0 stands on top, z_0 ~ N(0, I), and each further one is drawn given all above it:

    p(x, z) = p(x|h_L) prod_l p(z_l|h_l),  h_0 = None,  h_{l+1} = merge_l(h_l, z_l)

`bottom_up(x)` gives one feature for each level, top first; `log_likelihood(x, h)` gives log p(x|h)
[batch] of the h that the last level leaves. The posterior is in units of the prior.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from genjax import checks
from genjax.numerics import at_least_float32, log_mean_exp, sum_event
from genjax.randomness import indexed_normal
from genjax.typing import LogLikelihoodFn, PRNGKey
from genjax.variational.gaussian import gaussian_kl

__all__ = [
    "Level",
    "free_nats_kl",
    "hierarchical_elbo",
    "hierarchical_iwae",
    "hierarchical_latents",
    "hierarchical_sample",
    "kl_balance",
]

Bound = tuple[Float[Array, " batch"], dict[str, Array]]


class Level(NamedTuple):
    """One level as three functions of h, what the levels above have left ([batch, ...] or None).

    prior(h) -> mean, log variance of p(z|h), both [batch, *latent]; None for N(0, I), as on top.
    posterior(h, feature) -> (dm, dlog_s), both [batch, *latent]: with p(z|h) = N(m, s^2),
    q(z|h, x) = N(m + s dm, (s exp(dlog_s))^2). merge(h, z) -> the next h.
    """

    prior: Callable[[Any], tuple[Array, Array]] | None
    posterior: Callable[[Any, Any], tuple[Array, Array]]
    merge: Callable[[Any, Array], Any]


class _Descent(NamedTuple):
    """From the top to the bottom with samples of the posterior."""

    h: Any
    latents: list[Array]
    kl: Array  # [batch, levels], exact
    log_ratio: Array  # [batch], log q(z|x) - log p(z) of the samples


def hierarchical_elbo(
    bottom_up: Callable[[Array], Sequence[Any]],
    levels: Sequence[Level],
    log_likelihood: LogLikelihoodFn,
    key: PRNGKey,
    x: Shaped[Array, "batch *event"],
    *,
    beta: float | int | Float[Array, ""] = 1.0,
    free_nats: float = 0.0,
    balance: bool | Bool[Array, ""] = False,
    axis_name: str | None = None,
) -> Bound:
    """Return minus the evidence lower bound of each example, in nats, over all levels.

    loss = -log p(x|h_L) + beta sum_l KL_l,   KL_l = 1/2 sum (dm^2 + ds^2 - log ds^2 - 1)

    by one sample of each level; the divergence of a level is exact given those above it: Vahdat and
    Kautz, "NVAE", 2020, eq. (2), with dm in units of the prior. With one level it is `elbo`.
    free_nats, balance: as in `free_nats_kl` and `kl_balance`, for training, where the loss no
    longer is a bound (axis_name: of the devices that share the batch). aux always has the bound's
    own parts: `reconstruction` [batch] and `kl` [batch, levels], unweighted.

    Raises ValueError for levels that do not fit each other, a prior on top, as many features as
    there are no levels for, beta or free_nats below 0, and concrete data with NaN.

    >>> top = Level(None, lambda h, feature: (feature, 0 * feature), lambda h, z: z)
    >>> bottom_up = lambda x: [x[:, :2]]
    >>> log_likelihood = lambda x, h: gaussian_log_likelihood(x, jnp.tile(h, 2))
    >>> key, x = jax.random.key(0), jnp.ones((8, 4))
    >>> hierarchical_elbo(bottom_up, [top], log_likelihood, key, x)[0].shape
    (8,)
    """
    checks.at_least("beta", beta, 0)
    features = _features(bottom_up, levels, x)
    found = _descend(levels, features, key, len(x))
    reconstruction = _log_likelihood(log_likelihood, x, found.h)
    kl = free_nats_kl(found.kl, free_nats, axis_name=axis_name)
    if balance is not False:
        sizes = [z[0].size for z in found.latents]
        weights = kl_balance(found.kl, sizes, axis_name=axis_name)
        kl = kl * jnp.where(balance, weights, 1)[None]
    losses = beta * jnp.sum(kl, axis=1) - reconstruction
    return losses, {"reconstruction": reconstruction, "kl": found.kl}


def hierarchical_iwae(
    bottom_up: Callable[[Array], Sequence[Any]],
    levels: Sequence[Level],
    log_likelihood: LogLikelihoodFn,
    key: PRNGKey,
    x: Shaped[Array, "batch *event"],
    *,
    num_samples: int,
) -> Bound:
    """Return minus the importance weighted bound of each example, in nats, over all levels.

    loss = -log 1/K sum_k w_k,  log w = log p(x|h_L) + sum_l log p(z_l|h_l) - log q(z_l|h_l, x)

    Burda, Grosse and Salakhutdinov 2016, eq. (8), every sample with its own path through the
    levels: the callables see them as one batch, [num_samples * batch, ...], the samples first.
    aux: `reconstruction` [batch], `kl` [batch, levels], means over the samples, and
    `effective_samples` = 1 / sum_k v_k^2 for the normalised weights v. Raises ValueError as
    `hierarchical_elbo` does, and for num_samples < 1.

    >>> top = Level(None, lambda h, feature: (feature, 0 * feature), lambda h, z: z)
    >>> bottom_up = lambda x: [x[:, :2]]
    >>> log_likelihood = lambda x, h: gaussian_log_likelihood(x, jnp.tile(h, 2))
    >>> key, x = jax.random.key(0), jnp.ones((8, 4))
    >>> hierarchical_iwae(bottom_up, [top], log_likelihood, key, x, num_samples=5)[0].shape
    (8,)
    """
    checks.integer("num_samples", num_samples, 1)
    features = _features(bottom_up, levels, x)
    repeat = lambda y: jnp.repeat(y[None], num_samples, 0).reshape(-1, *y.shape[1:])  # noqa: E731
    found = _descend(levels, jax.tree.map(repeat, features), key, num_samples * len(x))
    by_sample = lambda y: y.reshape(num_samples, len(x), *y.shape[1:])  # noqa: E731
    reconstruction = by_sample(_log_likelihood(log_likelihood, repeat(x), found.h))
    log_weights = reconstruction - by_sample(found.log_ratio)
    weights = jax.nn.softmax(jax.lax.stop_gradient(log_weights), axis=0)
    aux = {
        "reconstruction": jnp.mean(reconstruction, axis=0),
        "kl": jnp.mean(by_sample(found.kl), axis=0),
        "effective_samples": 1 / jnp.sum(jnp.square(weights), axis=0),
    }
    return -log_mean_exp(log_weights, axis=0), aux


def hierarchical_latents(
    bottom_up: Callable[[Array], Sequence[Any]],
    levels: Sequence[Level],
    key: PRNGKey,
    x: Shaped[Array, "batch *event"],
) -> list[Float[Array, "batch ..."]]:
    """Draw z_l ~ q(z_l|h_l, x) from the top down; returns one array for each level.

    Raises ValueError as `hierarchical_elbo` does.

    >>> top = Level(None, lambda h, feature: (feature, 0 * feature), lambda h, z: z)
    >>> bottom_up = lambda x: [x[:, :2]]
    >>> z, = hierarchical_latents(bottom_up, [top], jax.random.key(0), jnp.ones((8, 4)))
    >>> z.shape
    (8, 2)
    """
    return _descend(levels, _features(bottom_up, levels, x), key, len(x)).latents


def hierarchical_sample(
    key: PRNGKey,
    levels: Sequence[Level],
    shape: Sequence[int],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    latents: Sequence[Float[Array, "batch ..."]] = (),
) -> tuple[Any, list[Float[Array, "batch ..."]]]:
    """Draw z_l ~ N(m_l, (temperature s_l)^2) from the priors; returns the last h, and every z_l.

    shape: [batch, *latent] of the top level. latents: those of the first levels where they are
    given and not drawn, such as a data point's own of `hierarchical_latents`. Row i depends on
    (key, i) alone. Raises ValueError for a temperature that is not positive and finite, more
    latents than levels, latents of another shape, or a lower level without a prior, whose shape
    nothing tells.

    >>> top = Level(None, lambda h, feature: (feature, 0 * feature), lambda h, z: z)
    >>> h, latents = hierarchical_sample(jax.random.key(0), [top], (5, 2))
    >>> h.shape
    (5, 2)
    """
    checks.positive("temperature", temperature)
    _check_levels(levels)
    if len(latents) > len(levels):
        raise ValueError(f"latents must be at most {len(levels)} levels', got {len(latents)}")
    h, drawn = None, []
    for i, level in enumerate(levels):
        if i and level.prior is None:
            raise ValueError(f"levels[{i}].prior must be a function, got None")
        mean, log_var = _prior(level, i, h, shape)
        checks.same_batch(**{"the top level's shape": jnp.zeros(shape[0]), f"level {i}": mean})
        if i < len(latents):
            z = at_least_float32(latents[i])
            checks.shape(f"latents[{i}]", z, mean.shape)
        else:
            noise = indexed_normal(jax.random.fold_in(key, i), mean.shape, dtype=mean.dtype)
            z = mean + temperature * jnp.exp(0.5 * log_var) * noise
        drawn.append(z)
        h = level.merge(h, z)
    return h, drawn


def free_nats_kl(
    kl: Float[Array, "batch levels"], free_nats: float, *, axis_name: str | None = None
) -> Float[Array, "batch levels"]:
    """Divergences, in nats, that cost `free_nats` a level at least: their batch mean is
    max(free_nats, mean_i KL_il).

    Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016: a level
    whose mean over the whole batch (over axis_name too) lies below gets no gradient, so that it is
    not driven to the prior early. With 0 nothing changes. Raises ValueError below 0.

    >>> free_nats_kl(jnp.array([[0.1, 2.0], [0.3, 4.0]]), 1.0).shape
    (2, 2)
    """
    checks.rank("kl", kl, 2)
    checks.at_least("free_nats", free_nats, 0)
    if checks.is_concrete(free_nats) and free_nats == 0:
        return kl
    mean = _batch_mean(kl, axis_name)
    return jnp.where((mean <= free_nats)[None], jnp.asarray(free_nats, kl.dtype), kl)


def kl_balance(
    kl: Float[Array, "batch levels"], sizes: Sequence[int], *, axis_name: str | None = None
) -> Float[Array, " levels"]:
    """Weights of the levels' divergences in warm-up: proportional to size_l mean_i KL_il, mean 1.

    Vahdat and Kautz, "NVAE", 2020, section 3.2: what a level holds already is made dearer, so that
    all of them come into use. No gradient flows through the weights; outside warm-up they make no
    bound. sizes: numbers in a latent of each level. Raises ValueError where they do not fit
    and for an empty batch.

    >>> kl_balance(jnp.array([[1.0, 3.0], [1.0, 5.0]]), sizes=(1, 4)).shape
    (2,)
    """
    checks.rank("kl", kl, 2)
    checks.not_empty("kl", kl)
    checks.shape("sizes", sizes, (kl.shape[1],))
    mean = jax.lax.stop_gradient(_batch_mean(kl, axis_name))
    weights = jnp.asarray(sizes, mean.dtype) * mean
    total = jnp.sum(weights)
    equal = total <= 0  # nothing is held anywhere yet
    return jnp.where(equal, 1, weights * len(sizes) / jnp.where(equal, 1, total))


def _batch_mean(kl: Array, axis_name: str | None) -> Array:
    mean = jnp.mean(at_least_float32(kl), axis=0)
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)


def _check_levels(levels: Sequence[Level]) -> None:
    if not levels:
        raise ValueError("levels must be at least one, got none")
    if levels[0].prior is not None:
        raise ValueError("levels[0].prior must be None: that of the top level is N(0, I)")


def _features(
    bottom_up: Callable[[Array], Sequence[Any]], levels: Sequence[Level], x: Array
) -> Sequence[Any]:
    """Check the arguments of a bound and call the way up."""
    _check_levels(levels)
    checks.min_rank("x", x, 1)
    checks.not_empty("x", x)
    checks.finite("x", x)
    features = bottom_up(x)
    if len(features) != len(levels):
        raise ValueError(
            f"bottom_up(x) must give one feature for each of {len(levels)} levels, "
            f"got {len(features)}"
        )
    return features


def _prior(level: Level, i: int, h: Any, shape: Sequence[int]) -> tuple[Array, Array]:
    """Mean and log variance of p(z|h); zeros of the shape where it is N(0, I)."""
    if level.prior is None:
        return jnp.zeros(tuple(shape)), jnp.zeros(tuple(shape))
    mean, log_var = level.prior(h)
    checks.floating(f"levels[{i}].prior(h)[0]", mean)
    checks.same_shape(**{f"levels[{i}].prior(h)[0]": mean, f"levels[{i}].prior(h)[1]": log_var})
    return at_least_float32(mean), at_least_float32(log_var)


def _descend(
    levels: Sequence[Level], features: Sequence[Any], key: PRNGKey, batch: int
) -> _Descent:
    """Draw from the posterior of every level in turn."""
    keys = jax.random.split(key, len(levels)) if len(levels) > 1 else [key]
    h, latents, kls, log_ratio = None, [], [], 0.0
    for i, (level, feature) in enumerate(zip(levels, features, strict=True)):
        dm, dlog_s = level.posterior(h, feature)
        name = f"levels[{i}].posterior(h, feature)"
        checks.floating(f"{name}[0]", dm)
        checks.min_rank(f"{name}[0]", dm, 2)
        checks.same_shape(**{f"{name}[0]": dm, f"{name}[1]": dlog_s})
        checks.shape(f"{name}[0]", dm, (batch, *dm.shape[1:]))
        dm, dlog_s = at_least_float32(dm), at_least_float32(dlog_s)
        mean, log_var = _prior(level, i, h, dm.shape)
        checks.same_shape(**{f"levels[{i}].prior(h)[0]": mean, f"{name}[0]": dm})
        noise = jax.random.normal(keys[i], dm.shape, dm.dtype)
        unit = dm + jnp.exp(dlog_s) * noise  # z in units of the prior
        z = unit if level.prior is None else mean + jnp.exp(0.5 * log_var) * unit
        latents.append(z)
        kls.append(gaussian_kl(dm, 2 * dlog_s))
        log_ratio += sum_event(0.5 * (jnp.square(unit) - jnp.square(noise)) - dlog_s)
        h = level.merge(h, z)
    return _Descent(h, latents, jnp.stack(kls, axis=1), jnp.asarray(log_ratio))


def _log_likelihood(log_likelihood: LogLikelihoodFn, x: Array, h: Any) -> Array:
    value = log_likelihood(x, h)
    checks.shape("log_likelihood(x, h)", value, x.shape[:1])
    return at_least_float32(value)
