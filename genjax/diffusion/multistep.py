"""Steps of higher order from one call of the denoiser: DPM-Solver++ and UniPC.

In l = log(alpha / sigma) the probability flow is exactly, with h = l_s - l_t,

    x_s = sigma_s / sigma_t x_t + alpha_s int_0^h e^(u - h) D(l_t + u) du,

and D is a polynomial through the denoised means of the steps before (Lu et al. 2022, eq. 9). Where
there are too few of them, at the first steps and at s = 0, the order is lower.
"""

import jax.numpy as jnp
from jaxtyping import Array

from genjax import checks
from genjax.diffusion.schedules import Scalar
from genjax.diffusion.steps import DenoiseAt, Move
from genjax.numerics import safe_sqrt

TERMS = 18  # of the series below h = 1, whose rest is then below the rounding of float64


def dpm_solver_step(
    denoise: DenoiseAt, x: Array, move: Move, /, *, order: int = 2, eta: Scalar = 0.0
) -> tuple[Array, Array]:
    """DPM-Solver++(2M) or (3M), of order 2 or 3 in l; with eta > 0 their SDE, of weak order 2.

    x' = e^(-eta h) sigma_s / sigma_t x + alpha_s D' + sigma_s sqrt(1 - e^(-2 eta h)) z, with
    D' = (1 - e^(-(1 + eta) h)) (D + h / (2 h_before) (D - D_before)) for order 2 (Lu et al. 2022,
    Algorithm 2; eta = 1 is their SDE-DPM-Solver++(2M)). For order 3 D' integrates the parabola
    through the last three means. (The authors' code for 3M has half of its second coefficient, an
    error of the second order.) The first step is of order 1: that is felt where D changes there.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> process = EDM()
    >>> times = time_grid(process, 8)
    >>> options = dict(process=process, times=times, step=dpm_solver_step)
    >>> sample(denoise, jax.random.key(0), (5, 2), **options).shape
    (5, 2)
    """
    checks.one_of("order", order, (2, 3))
    t, s, process = move.t, move.s, move.process
    denoised = denoise(x, t)
    h, h_before, h_earlier = _widths(move)
    scale = process.sigma(s) / process.sigma(t)
    still = isinstance(eta, int | float) and eta == 0
    wide = h if still else (1 + eta) * h
    first, second = _backward(denoised, move, h, h_before, h_earlier)
    if order == 2:
        integral = -jnp.expm1(-wide) * (denoised + 0.5 * first)
    else:
        zeroth_moment, first_moment, second_moment = _moments(wide, 3)
        share = jnp.where(h_earlier > 0, h_before / _safe(h_before + h_earlier), 0.0)
        integral = zeroth_moment * denoised + first_moment * (first + share * second)
        integral = integral + second_moment * (h / _safe(h_before + h_earlier)) * second
    if still:
        return scale * x + process.alpha(s) * integral, denoised
    x = jnp.exp(-eta * h) * scale * x + process.alpha(s) * integral
    added = process.sigma(s) * safe_sqrt(jnp.maximum(-jnp.expm1(-2 * eta * h), 0.0))
    return x + added * move.normal(0, x), denoised


def unipc_step(denoise: DenoiseAt, x: Array, move: Move, /) -> tuple[Array, Array]:
    """UniPC of order 3: DPM-Solver++(2M), then a correction as soon as D at the new time is known.

    D at x_t, which the next step needs anyway, gives a parabola over the step that led to x_t, and
    x_t is moved by alpha_t times what its integral adds; the corrected x_t goes on (Zhao et al.
    2023, Algorithms 1 and 2: UniP-2 with UniC-2 and B(h) = e^h - 1). The last step is uncorrected.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> process = EDM()
    >>> times = time_grid(process, 8)
    >>> options = dict(process=process, times=times, step=unipc_step)
    >>> sample(denoise, jax.random.key(0), (5, 2), **options).shape
    (5, 2)
    """
    t, s, process = move.t, move.s, move.process
    denoised = denoise(x, t)
    h, h_before, h_earlier = _widths(move)
    # Over the last step, in units of its width: predicted with `behind`, corrected with `ahead`.
    known, before = (h_before > 0), move.denoised_before
    ahead = jnp.where(known, 1.0, 0.0) * (denoised - before)
    ratio = jnp.where(h_earlier > 0, h_before / _safe(h_earlier), 0.0)
    earlier = before if move.denoised_earlier is None else move.denoised_earlier
    behind = ratio * (before - earlier)
    share = jnp.where(h_earlier > 0, h_before / _safe(h_before + h_earlier), 0.0)
    bend = share * (ahead - behind)
    zeroth_moment, first_moment, second_moment = _moments(h_before, 3)
    moved = first_moment * (ahead - bend) + second_moment * bend - 0.5 * zeroth_moment * behind
    x = x + process.alpha(t) * moved
    first, _ = _backward(denoised, move, h, h_before, h_earlier)
    integral = -jnp.expm1(-h) * (denoised + 0.5 * first)
    return process.sigma(s) / process.sigma(t) * x + process.alpha(s) * integral, denoised


def _widths(move: Move) -> tuple[Array, Array, Array]:
    """Widths in l of this step and of the two before, 0 where there was none."""
    earlier = move.t_before if move.t_earlier is None else move.t_earlier
    levels = [0.5 * move.process.log_snr(t) for t in (move.s, move.t, move.t_before, earlier)]
    return levels[0] - levels[1], levels[1] - levels[2], levels[2] - levels[3]


def _backward(
    denoised: Array, move: Move, h: Array, h_before: Array, h_earlier: Array
) -> tuple[Array, Array]:
    """Slope of D over the last step, and its change since the one before, times h; 0 if unknown.

    Both 0 for the step to s = 0, whose h is infinite: no polynomial reaches so far.
    """
    goes_on = move.process.sigma(move.s) > 0
    second = goes_on & (h_before > 0)
    slope = jnp.where(second, h / _safe(h_before), 0.0) * (denoised - move.denoised_before)
    if move.denoised_earlier is None:
        return slope, 0 * slope
    third = second & (h_earlier > 0)
    past = jnp.where(third, h / _safe(h_earlier), 0.0)
    change = slope - past * (move.denoised_before - move.denoised_earlier)
    return slope, jnp.where(third, 1.0, 0.0) * change


def _safe(h: Array) -> Array:
    return jnp.where(h > 0, h, 1.0)


def _moments(h: Array, num: int) -> list[Array]:
    """h int_0^1 e^(h (u - 1)) u^k du for k = 0 .. num - 1: 1 - k / h times the one before."""
    small = h < 1
    inside, outside = jnp.where(small, h, 1.0), jnp.where(small, 1.0, h)
    found = [-jnp.expm1(-h)]
    for k in range(1, num):
        series = jnp.ones_like(h)
        for j in range(TERMS, 0, -1):
            series = 1 - inside / (k + 1 + j) * series
        found.append(jnp.where(small, inside / (k + 1) * series, 1 - k * found[-1] / outside))
    return found
