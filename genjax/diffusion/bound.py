"""DDPM's variational bound, with a discretised Gaussian decoder; the loss that learns variances."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks
from genjax.diffusion.denoising import PREDICTIONS, check_times, convert, same_shape
from genjax.diffusion.discrete import posterior
from genjax.diffusion.schedules import Process, Scalar
from genjax.diffusion.steps import MixFn, mix_of
from genjax.numerics import at_least_float32, exp_excess, expand_to, sum_event
from genjax.randomness import low_discrepancy
from genjax.typing import DenoiserFn, PRNGKey


def discretised_gaussian(
    x: Float[Array, "*shape"],
    mean: Float[Array, "*shape"],
    std: Float[Array, "*shape"],
    *,
    levels: int,
    low: float = -1.0,
    high: float = 1.0,
) -> Float[Array, "*shape"]:
    """Log probability of each value's bin under N(mean, std^2), nats; the outer bins are open.

    `levels` bins of equal width fill [low, high] and x holds their centres, as
    `genjax.data.Scaling` has it (Ho et al. 2020, eq. 13, whose outer centres are -1 and 1: low and
    high are -+256/255). A difference of logs of normal CDFs in the tail where they are small, so it
    neither underflows nor loses its gradient. Raises where concrete x is not at a bin's centre.

    >>> x = (jnp.arange(17) + 0.5) / 17 * 2 - 1
    >>> p = jnp.exp(discretised_gaussian(x, jnp.zeros(17), jnp.full(17, 0.3), levels=17))
    >>> p.sum().round(3)
    Array(1., dtype=float32)
    """
    checks.integer("levels", levels, 2)
    checks.positive("std", std)
    x, mean, std = at_least_float32(x), at_least_float32(mean), at_least_float32(std)
    _check_centres(x, levels, low, high)
    half = 0.5 * (high - low) / levels
    lower, upper = (x - half - mean) / std, (x + half - mean) / std
    # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): take the side on which both are at most about 1/2.
    flip = lower > 0
    a, b = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
    log_a, log_b = _log_ndtr(a), _log_ndtr(b)
    gap = jnp.maximum(log_b - log_a, jnp.finfo(x.dtype).tiny)
    inside = log_b + jnp.log(-jnp.expm1(-gap))
    first, last = x < low + 2 * half, x > high - 2 * half
    outside = _log_ndtr(jnp.where(first, upper, -lower))
    return jnp.where(first | last, outside, inside)


@jax.custom_jvp
def _log_ndtr(z: Array) -> Array:
    """log Phi(z), whose derivative phi / Phi holds in the far tail too: there jax forms it as the
    exponential of a difference of numbers near z^2 / 2."""
    return jax.scipy.special.log_ndtr(z)


@_log_ndtr.defjvp
def _log_ndtr_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (z,), (dz,) = primals, tangents
    value = _log_ndtr(z)
    far = z < (-10 if z.dtype == jnp.float32 else -30)
    near, tail = jnp.where(far, 0, z), jnp.where(far, z, -30)
    ratio = jnp.exp(-0.5 * jnp.square(near) - 0.5 * math.log(2 * math.pi) - _log_ndtr(near))
    # Mills' ratio, Phi / phi = -1/z (1 - 1/z^2 + 3/z^4 - 15/z^6 + ...).
    w = 1 / jnp.square(tail)
    series = 1 - w * (1 - 3 * w * (1 - 5 * w * (1 - 7 * w * (1 - 9 * w * (1 - 11 * w)))))
    return value, jnp.where(far, -tail / series, ratio) * dz


def _check_centres(x: Array, levels: int, low: float, high: float) -> None:
    if not checks.is_concrete(x) or not x.size:
        return
    number = (np.asarray(x, np.float64) - low) / (high - low) * levels - 0.5
    nearest = np.clip(np.round(number), 0, levels - 1)
    if not np.all(np.abs(number - nearest) < 0.05):
        half = 0.5 * (high - low) / levels
        raise ValueError(
            f"x must hold centres of the {levels} bins that fill [{low}, {high}], from "
            f"{low + half} to {high - half}, got values from {x.min()} to {x.max()}"
        )


class _Chain(NamedTuple):
    """The chain of a bound: its noise, its number of steps, and the bins of the data."""

    process: Process
    num_steps: int
    levels: int
    low: float
    high: float

    def checked(self, x: Array) -> Array:
        """x in float32 at least."""
        checks.integer("num_steps", self.num_steps, 1)
        checks.floating("x", x)
        checks.min_rank("x", x, 1)
        x = at_least_float32(x)
        _check_centres(x, self.levels, self.low, self.high)
        check_times(self.process.t_max, self.process)
        return x

    def prior(self, x: Array) -> Array:
        """KL(q(x_T | x) || N(0, sigma_T^2 I)) up to the variance, which is the same."""
        t = self.process.t_max
        return sum_event(0.5 * jnp.square(self.process.alpha(t) * x) / self.process.variance(t))

    def times(self, number: Array, dtype: Any) -> tuple[Array, Array]:
        """(t, s) of step i = number [batch], from t to s."""
        t, s = (n.astype(dtype) / self.num_steps for n in (number, number - 1))
        return self.process.t_max * t, self.process.t_max * s

    def one_step_each(self, key: PRNGKey, batch: int) -> Array:
        """A step 1..T for every example, evenly spread."""
        spread = low_discrepancy(key, batch)
        return 1 + jnp.minimum((spread * self.num_steps).astype(jnp.int32), self.num_steps - 1)

    def noised(self, x: Array, t: Array, eps: Array) -> Array:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return expand_to(alpha, x) * x + expand_to(sigma, x) * eps

    def terms(
        self, x: Array, mean: Array, mix: Scalar | Array, number: Array
    ) -> tuple[Array, Array]:
        """(KL of step i, or 0 for i = 1; -log P(x | x_1), or 0 for i > 1), i = number [batch].

        mean: the denoised mean; mix: a number, or one for each coordinate.
        """
        t, s = self.times(number, x.dtype)
        first = number == 1
        moments = posterior(self.process, t, s)
        gap = jnp.log(jnp.where(first, 1.0, moments.variance / moments.forward_variance))
        # log of the true variance over the model's
        log_ratio = mix * expand_to(gap, x)
        variance = expand_to(jnp.where(first, 1.0, moments.variance), x) / jnp.exp(log_ratio)
        error = 0.5 * expand_to(moments.x0_coef**2, x) * jnp.square(x - mean) / variance
        kl = sum_event(0.5 * jnp.broadcast_to(exp_excess(log_ratio), x.shape) + error)
        std = jnp.broadcast_to(expand_to(self.process.sigma(t), x), x.shape)
        bins = {"levels": self.levels, "low": self.low, "high": self.high}
        decoded = sum_event(-discretised_gaussian(x, mean, std, **bins))
        return jnp.where(first, 0.0, kl), jnp.where(first, decoded, 0.0)


def variational_bound(
    denoise: DenoiserFn,
    key: PRNGKey,
    x: Float[Array, "batch *event"],
    *,
    process: Process,
    num_steps: int,
    levels: int,
    low: float = -1.0,
    high: float = 1.0,
    mix: Scalar | MixFn = 0.0,
    every_step: bool = False,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """Bound on -log P(x) in nats for the chain of `num_steps` `ancestral_step`s (Ho et al. 2020).

    KL(q(x_T | x) || N(0, sigma_T^2 I)) + sum_i KL(q(x_{i-1} | x_i, x) || p(x_{i-1} | x_i))
    - log P(x | x_1), eq. 5: noise at every step with `every_step`, else one step i per example,
    times T: unbiased either way. x holds centres of `levels` bins that fill [low, high], see
    `discretised_gaussian`. `mix` sets the model's variance as in `ancestral_step`, a number or a
    function of (x_t, t); x_1 is decoded with standard deviation sigma(t_1). Raises as
    `discretised_gaussian` does, and where the denoiser or `mix` changes the shape.
    Returns (losses [batch], aux: "prior", "diffusion", "reconstruction").

    >>> denoise = lambda x, t: 0 * x
    >>> key, options = jax.random.key(0), dict(process=VariancePreserving(), num_steps=10)
    >>> losses, aux = variational_bound(denoise, key, jnp.zeros((4, 2)), levels=17, **options)
    >>> losses.shape
    (4,)
    """
    chain = _Chain(process, num_steps, levels, low, high)
    x = chain.checked(x)
    prior = chain.prior(x)

    def term(number: Array, key: PRNGKey) -> tuple[Array, Array]:
        t, _ = chain.times(number, x.dtype)
        x_t = chain.noised(x, t, jax.random.normal(key, x.shape, x.dtype))
        mean = at_least_float32(denoise(x_t, t))
        same_shape(mean, x)
        return chain.terms(x, mean, mix_of(mix, x_t, t), number)

    if every_step:

        def body(sums: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
            numbers = jnp.full(x.shape[:1], number)
            kl, decoded = term(numbers, jax.random.fold_in(key, number))
            return (sums[0] + kl, sums[1] + decoded), None

        zeros = jnp.zeros_like(prior)
        (kl, decoded), _ = jax.lax.scan(body, (zeros, zeros), jnp.arange(1, num_steps + 1))
    else:
        time_key, noise_key = jax.random.split(key)
        number = chain.one_step_each(time_key, x.shape[0])
        kl, decoded = (num_steps * value for value in term(number, noise_key))
    return prior + kl + decoded, {"prior": prior, "diffusion": kl, "reconstruction": decoded}


def hybrid_loss(
    network: Callable[[Array, Array], tuple[Array, Array]],
    key: PRNGKey,
    x: Float[Array, "batch *event"],
    *,
    process: Process,
    num_steps: int,
    levels: int,
    low: float = -1.0,
    high: float = 1.0,
    prediction: str = "epsilon",
    bound_weight: Scalar = 1e-3,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """L_simple + bound_weight L_vlb, to learn the variance too (Nichol & Dhariwal 2021, eq. 16).

    `network` maps (x_t, t) to (a prediction of kind `prediction`, v), both of the shape of x. With
    step i drawn per example and t = t_i, L_simple = |eps - eps_predicted|^2 (eq. 14), and L_vlb is
    the nats of `variational_bound` with variance beta^v beta~^(1 - v) (eq. 15), v for each
    coordinate and not held to [0, 1]. The bound's gradient reaches v alone: in it the mean is a
    constant. Both are summed over the event; one call of the network. The variance of the last
    step, beta~ = 0, is not learned, see `variational_bound`.

    Afterwards `partial(ancestral_step, mix=lambda x, t: network(x, t)[1])` samples with it.
    Raises as `variational_bound` does. Returns (losses [batch], aux: "simple", "bound").

    >>> network = lambda x, t: (x, 0 * x)
    >>> key, options = jax.random.key(0), dict(process=VariancePreserving(), num_steps=10)
    >>> losses, aux = hybrid_loss(network, key, jnp.zeros((4, 2)), levels=17, **options)
    >>> losses.shape
    (4,)
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    checks.at_least("bound_weight", bound_weight, 0)
    chain = _Chain(process, num_steps, levels, low, high)
    x = chain.checked(x)
    time_key, noise_key = jax.random.split(key)
    number = chain.one_step_each(time_key, x.shape[0])
    t, _ = chain.times(number, x.dtype)
    eps = jax.random.normal(noise_key, x.shape, x.dtype)
    x_t = chain.noised(x, t, eps)
    value, mix = (at_least_float32(part) for part in network(x_t, t))
    same_shape(value, x)
    checks.shape("the variance that network returns", mix, x.shape)
    mean, noise = (
        convert(value, x_t, t, source=prediction, target=target, process=process)
        for target in ("x0", "epsilon")
    )
    simple = sum_event(jnp.square(eps - noise))
    kl, decoded = chain.terms(x, jax.lax.stop_gradient(mean), mix, number)
    bound = chain.prior(x) + num_steps * (kl + decoded)
    return simple + bound_weight * bound, {"simple": simple, "bound": bound}
