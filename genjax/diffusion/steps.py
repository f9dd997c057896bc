"""One step of each sampler, from time t to an earlier time s: pure, one function a method.

Most methods are stated in y = x / alpha and the clock l = sigma / alpha, in which every process is
variance exploding: dy/dl = (y - D) / l is the probability flow. A step to s = 0 returns the
denoised mean, without noise.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax import checks
from genjax.diffusion.discrete import posterior
from genjax.diffusion.schedules import Scalar
from genjax.numerics import at_least_float32, safe_sqrt
from genjax.randomness import Index, indexed_keys, indexed_normal
from genjax.typing import PRNGKey

# The denoiser at one time for the whole batch: (x [batch, *event], t []) -> [batch, *event].
DenoiseAt: TypeAlias = Callable[[Array, Array], Array]


class Move(NamedTuple):
    """What a step knows besides x at time t.

    t, s: the times before and after. process: the noise schedule, as the caller of the scan gave
    it. step_key: the key of this step, whatever the batch. first_index: the index of row 0.
    denoised_before, t_before: the second value that the step before returned (zeros at the first
    step), and its time. denoised_earlier, t_earlier: those of the step before that.
    """

    t: Array
    s: Array
    process: Any
    step_key: PRNGKey
    first_index: Index
    denoised_before: Any
    t_before: Array
    denoised_earlier: Any = None
    t_earlier: Array | None = None

    def key(self, n: int) -> PRNGKey:
        """The n-th key of this step; `row_keys` and `normal` make the rows of it."""
        return jax.random.fold_in(self.step_key, n)

    def row_keys(self, n: int, num: int) -> Array:
        """One key for each of `num` rows: that of row i depends on its index alone."""
        return indexed_keys(self.key(n), num, self.first_index)

    def normal(self, n: int, like: Array) -> Array:
        """The n-th standard normal of this step, in the shape and dtype of `like`."""
        return indexed_normal(self.key(n), like.shape, self.first_index, like.dtype)


# A learned variance (x_t [batch, *event], t [batch]) -> v [batch, *event], see `ancestral_step`.
MixFn: TypeAlias = Callable[[Array, Array], Array]
# (denoise, x at t, move) -> (x at s, denoised mean at t)
StepFn: TypeAlias = Callable[[DenoiseAt, Array, Move], tuple[Array, Array]]


def euler_maruyama_step(denoise: DenoiseAt, x: Array, move: Move, /) -> tuple[Array, Array]:
    """y' = y + (l_s^2 - l_t^2) / l_t^2 (y - D) + sqrt(l_t^2 - l_s^2) z.

    Euler-Maruyama for the reverse SDE in the clock l^2: Algorithm 3 of the notes, Song et al. 2021,
    eq. 46. The noise is dropped at s = 0, where it would stay in the sample.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> process = EDM()
    >>> times = time_grid(process, 8)
    >>> options = dict(process=process, times=times, step=euler_maruyama_step)
    >>> x = sample(denoise, jax.random.key(0), (5, 2), **options)
    >>> x.shape
    (5, 2)
    """
    t, s, process = move.t, move.s, move.process
    y, level, next_level = x / process.alpha(t), process.noise_ratio(t), process.noise_ratio(s)
    denoised = denoise(x, t)
    shrink = (next_level / level) ** 2
    # Two times next to each other may round to levels in the wrong order.
    noise = jnp.where(next_level > 0, level * safe_sqrt(jnp.maximum(1 - shrink, 0)), 0.0)
    y = y + (shrink - 1) * (y - denoised) + noise * move.normal(0, x)
    return process.alpha(s) * y, denoised


def ancestral_step(
    denoise: DenoiseAt,
    x: Array,
    move: Move,
    /,
    *,
    mix: Scalar | MixFn = 0.0,
) -> tuple[Array, Array]:
    """Sample x_s from q(x_s | x_t, x_0 = D): Algorithm 4 of the notes; DDPM (Ho et al. 2020).

    The variance is beta^mix beta~^(1 - mix) (Nichol & Dhariwal 2021, eq. 15): 0 is the posterior
    variance beta~ = r v (`posterior`), which vanishes at s = 0; 1 is the forward variance. A
    function of (x_t, t) gives one mix per coordinate, a variance that was learned by `hybrid_loss`.
    Raises ValueError where it changes the shape.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> process = EDM()
    >>> times = time_grid(process, 8)
    >>> options = dict(process=process, times=times, step=ancestral_step)
    >>> sample(denoise, jax.random.key(0), (5, 2), **options).shape
    (5, 2)
    """
    t, s, process = move.t, move.s, move.process
    moments = posterior(process, t, s)
    denoised = denoise(x, t)
    mix = mix_of(mix, x, jnp.broadcast_to(t, x.shape[:1]).astype(x.dtype))
    last = moments.variance <= 0
    shrink = jnp.where(last, 1.0, moments.variance / moments.forward_variance)
    variance = jnp.where(last, 0.0, moments.forward_variance * shrink ** (1 - mix))
    mean = moments.x0_coef * denoised + moments.xt_coef * x
    return mean + safe_sqrt(variance) * move.normal(0, x), denoised


def mix_of(mix: Scalar | MixFn, x: Array, t: Array) -> Scalar | Array:
    """The number itself, or one for each coordinate of x_t [batch, *event] at t [batch]."""
    if not callable(mix):
        return mix
    value = at_least_float32(mix(x, t))
    checks.shape("what mix returns", value, x.shape)
    return value


def ddpm_step(denoise: DenoiseAt, x: Array, move: Move, /) -> tuple[Array, Array]:
    """DDPM with variance beta, the forward one (Ho et al. 2020, Algorithm 2).

    >>> denoise = lambda x, t: x / 2
    >>> process = VariancePreserving()
    >>> times = time_grid(process, 8, spacing="uniform")
    >>> options = dict(process=process, times=times, step=ddpm_step)
    >>> sample(denoise, jax.random.key(0), (5, 2), **options).shape
    (5, 2)
    """
    return ancestral_step(denoise, x, move, mix=1.0)


def ddim_step(
    denoise: DenoiseAt,
    x: Array,
    move: Move,
    /,
    *,
    eta: Scalar = 0.0,
) -> tuple[Array, Array]:
    """x' = alpha_s D + sqrt(sigma_s^2 - u^2) eps + u z, u^2 = eta^2 beta~.

    DDIM (Song, Meng & Ermon 2021, eqs 12 and 16). eta = 0 is Euler's method for the probability
    flow in the clock l; eta = 1 is `ancestral_step`.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> process = EDM()
    >>> times = time_grid(process, 8)
    >>> options = dict(process=process, times=times, step=ddim_step)
    >>> sample(denoise, jax.random.key(0), (5, 2), **options).shape
    (5, 2)
    """
    t, s, process = move.t, move.s, move.process
    denoised = denoise(x, t)
    eps = (x - process.alpha(t) * denoised) / process.sigma(t)
    sigma = process.sigma(s)
    if isinstance(eta, int | float) and eta == 0:
        return process.alpha(s) * denoised + sigma * eps, denoised
    # beta~ = sigma_s^2 (1 - rest): factors, because at s = 0 roots of differences have no slope.
    log_rest = process.log_snr(t) - process.log_snr(s)
    kept = safe_sqrt(jnp.maximum(1 - eta**2 + eta**2 * jnp.exp(log_rest), 0.0))
    x = process.alpha(s) * denoised + sigma * kept * eps
    added = sigma * eta * safe_sqrt(jnp.maximum(-jnp.expm1(log_rest), 0.0))
    return x + added * move.normal(0, x), denoised


def euler_step(denoise: DenoiseAt, x: Array, move: Move, /) -> tuple[Array, Array]:
    """x' = x + (s - t) (f x - g^2 score / 2): Euler for the probability flow in t itself.

    Song et al. 2021, eq. 13, with f and g^2 from the process by differentiation.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> process = EDM()
    >>> times = time_grid(process, 8)
    >>> options = dict(process=process, times=times, step=euler_step)
    >>> sample(denoise, jax.random.key(0), (5, 2), **options).shape
    (5, 2)
    """
    t, s, process = move.t, move.s, move.process
    denoised = denoise(x, t)
    score = (process.alpha(t) * denoised - x) / process.variance(t)
    slope = process.drift(t) * x - 0.5 * process.diffusion_squared(t) * score
    return jnp.where(s > 0, x + (s - t) * slope, denoised), denoised


def heun_step(
    denoise: DenoiseAt,
    x: Array,
    move: Move,
    /,
    *,
    churn: Scalar = 0.0,
    churn_min: Scalar = 0.0,
    churn_max: Scalar = math.inf,
    noise_scale: Scalar = 1.0,
) -> tuple[Array, Array]:
    """Heun's method in the clock l, after raising the noise (Karras et al. 2022, Algorithms 1, 2).

    `churn` is their S_churn / N: inside [churn_min, churn_max] the level is first raised to
    l (1 + min(churn, sqrt 2 - 1)), at most to that of t_max, with noise of scale `noise_scale`.
    churn = 0 is deterministic. Two calls of the denoiser, one where s = 0.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> process = EDM()
    >>> times = time_grid(process, 8)
    >>> options = dict(process=process, times=times, step=heun_step)
    >>> sample(denoise, jax.random.key(0), (5, 2), **options).shape
    (5, 2)
    """
    t, s, process = move.t, move.s, move.process
    y, level, next_level = x / process.alpha(t), process.noise_ratio(t), process.noise_ratio(s)
    if not (isinstance(churn, int | float) and churn == 0):
        inside = (level >= churn_min) & (level <= churn_max)
        gamma = jnp.where(inside, jnp.minimum(churn, math.sqrt(2) - 1), 0.0)
        raised = jnp.minimum(level * (1 + gamma), process.noise_ratio(process.t_max))
        added = jnp.maximum(raised**2 - level**2, 0.0)
        y = y + noise_scale * safe_sqrt(added) * move.normal(0, x)
        t = jnp.where(raised > level, process.time_of_noise_ratio(raised), t)
        level = jnp.where(raised > level, raised, level)
    denoised = denoise(process.alpha(t) * y, t)
    slope = (y - denoised) / level
    euler = y + (next_level - level) * slope

    def corrected() -> Array:
        # Under vmap both branches are computed: at s = 0 this one must stay finite.
        safe = jnp.where(next_level > 0, next_level, 1.0)
        end = (euler - denoise(process.alpha(s) * euler, s)) / safe
        return (y + (next_level - level) * 0.5 * (slope + end)).astype(x.dtype)

    y = jax.lax.cond(next_level > 0, corrected, lambda: denoised.astype(x.dtype))
    return process.alpha(s) * y, denoised


def predictor_corrector_step(
    denoise: DenoiseAt,
    x: Array,
    move: Move,
    /,
    *,
    predictor: StepFn = ancestral_step,
    corrections: int = 1,
    snr: Scalar = 0.16,
) -> tuple[Array, Array]:
    """A predictor, then Langevin steps x += d score + sqrt(2 d) z at s, d = 2 (snr sigma_s)^2.

    Song et al. 2021, Algorithms 4 and 5. The paper's step size has |z| / |score| averaged over the
    batch in place of sigma_s, which is about its value; sigma_s keeps one sample independent of the
    others. No correction at s = 0.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> process = EDM()
    >>> times = time_grid(process, 8)
    >>> options = dict(process=process, times=times, step=predictor_corrector_step)
    >>> sample(denoise, jax.random.key(0), (5, 2), **options).shape
    (5, 2)
    """
    s, process, dtype = move.s, move.process, x.dtype
    x, denoised = predictor(denoise, x, move)

    def corrected() -> Array:
        moved = x
        for n in range(corrections):
            # d score = 2 snr^2 (alpha D - x), without sigma_s, which may be 0.
            shift = 2 * snr**2 * (process.alpha(s) * denoise(moved, s) - moved)
            moved = moved + shift + 2 * snr * process.sigma(s) * move.normal(n + 1, x)
        return moved.astype(dtype)

    return jax.lax.cond(s > 0, corrected, lambda: x.astype(dtype)), denoised
