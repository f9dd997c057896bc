"""One table of f-divergences: generators, conjugates, critics' activations and optima.

    D_f(P || Q) = E_Q f(p/q) >= E_P[g(V)] - E_Q[f*(g(V))]                      for every V,

with equality iff g(V) = f'(p/q). f is convex and lower semicontinuous with f(1) = 0 (-log 4 for
`gan`); f*(t) = sup_u (u t - f(u)) is its conjugate; g maps a raw score V in R onto the domain of f*
and increases, so that a large V always means "from P". All values are in nats.

Nowozin, Cseke, Tomioka, "f-GAN", NeurIPS 2016 (arXiv:1606.00709), eqs. 4-6. Three points where
the table departs from what is often printed: Jensen-Shannon is the halved one, at most log 2; the
activations of `reverse_kl`, `neyman` and `squared_hellinger` are the increasing ones; the conjugate
of `pearson` is the supremum over u >= 0, hence -1 below t = -2 (t^2/4 + t there is a looser bound).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import softplus
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float

from genjax import checks
from genjax.numerics import at_least_float32, exp_excess, masked_mean
from genjax.typing import LogProbFn

__all__ = ["F_DIVERGENCES", "FDivergence", "f_divergence"]

LOG_2 = math.log(2)
LOG_4 = math.log(4)
# Other names of the field, for the error message: ours say which multiple is meant.
ALIASES = {
    "js": "jensen_shannon",
    "jsd": "jensen_shannon",
    "hellinger": "squared_hellinger",
    "tv": "total_variation",
    "chi2": "pearson",
    "chi_squared": "pearson",
    "pearson_chi2": "pearson",
    "neyman_chi2": "neyman",
    "forward_kl": "kl",
    "rkl": "reverse_kl",
    "symmetric_kl": "jeffreys",
}
Elementwise = Callable[[Array], Array]


class FDivergence(NamedTuple):
    """One f-divergence; every function is element-wise.

    f: the generator, on u >= 0 (infinity below 0).
    f_of_log: l -> f(exp(l)), which stays finite where exp(l) underflows.
    dual: name of the divergence of the generator u f(1/u), that is of D_f(Q || P).
    conjugate: f*(t), +infinity outside the domain.
    domain: lower and upper end of the interval where f* is finite.
    activation: g, from a raw score in R into the domain.
    conjugate_activation: v -> f*(g(v)) in one stable expression.
    optimal_critic: r = p/q -> the raw score V* with g(V*) = f'(r).
    slope_of_log: l -> f'(exp(l)) = g(V*(exp(l))), which neither overflows nor cancels in l; None
    for `total_variation`, whose slope is constant on either side of 1.
    """

    f: Elementwise
    f_of_log: Elementwise
    dual: str
    conjugate: Elementwise
    domain: tuple[float, float]
    activation: Elementwise
    conjugate_activation: Elementwise
    optimal_critic: Elementwise
    slope_of_log: Elementwise | None = None


def _entry(*, dual: str, domain: tuple[float, float], **functions: Elementwise) -> FDivergence:
    """Build an entry whose functions take anything that converts to a floating array."""

    def lift(function: Elementwise) -> Elementwise:
        return lambda x: function(at_least_float32(x))

    lifted = {name: lift(function) for name, function in functions.items()}
    return FDivergence(dual=dual, domain=domain, **lifted)


def _below(limit: float, inside: Elementwise, closed: bool = False) -> Elementwise:
    """Give `inside(t)` where t is below the limit, +infinity elsewhere, both gradient-safe."""

    def conjugate(t: Array) -> Array:
        kept = t <= limit if closed else t < limit
        return jnp.where(kept, inside(jnp.where(kept, t, limit - 1)), jnp.inf)

    return conjugate


def _nonnegative(f: Elementwise) -> Elementwise:
    """Extend a generator by +infinity to u < 0."""

    def generator(u: Array) -> Array:
        return jnp.where(u >= 0, f(jnp.where(u >= 0, u, 1)), jnp.inf)

    return generator


def _u_log_u(log_ratio: Array) -> Array:
    """Evaluate l exp(l), which is 0 at l = -infinity."""
    zero = log_ratio == -jnp.inf
    return jnp.where(zero, 0, jnp.exp(log_ratio) * jnp.where(zero, 0, log_ratio))


def _u_log_u_excess(log_ratio: Array) -> Array:
    """u log u - u + 1 = u (exp(-l) - 1 + l) with l = log u; 1 at l = -infinity."""
    near = jnp.abs(log_ratio) < 0.5
    s = jnp.where(near, log_ratio, 0)
    return jnp.where(near, jnp.exp(s) * exp_excess(-s), _u_log_u(log_ratio) - jnp.expm1(log_ratio))


def _jensen_shannon_of_log(x: Array) -> Array:
    """(1 + u) / 4 [(1 + s) log(1 + s) + (1 - s) log(1 - s)], s = tanh(log u / 2), never negative.

    Near 0 the bracket is its series, the sum of s^2k / (k (2k - 1)).
    """
    near = jnp.abs(x) < 0.25
    square = jnp.square(jnp.tanh(jnp.where(near, x, 0) / 2))
    series = functools.reduce(
        lambda tail, k: 1 / (k * (2 * k - 1)) + square * tail, range(9, 0, -1), 0 * square
    )
    far = (_u_log_u(x) - (1 + jnp.exp(x)) * (softplus(x) - LOG_2)) / 2
    return jnp.where(near, (1 + jnp.exp(jnp.where(near, x, 0))) / 4 * square * series, far)


def _gan_of_log(x: Array) -> Array:
    """-u log(1 + 1/u) - log(1 + u): two terms of one sign, the first of which goes to -1."""
    far = x > 15
    s, y = jnp.where(far, 0, x), jnp.exp(-jnp.where(far, x, 15))
    first = jnp.where(far, 1 - y / 2 + jnp.square(y) / 3, jnp.exp(s) * softplus(-s))
    return -jnp.where(x == -jnp.inf, 0, first) - softplus(x)


@jax.custom_jvp
def _log_omega(s: Array) -> Array:
    """Solve y + exp(y) = s for y by Newton's method, from above, where it falls monotonically."""
    y = jnp.where(s > 1, jnp.log(jnp.maximum(s, 1)), s)
    for _ in range(6):  # quadratic: 6 steps reach float64 rounding from this start, for every s
        w = jnp.exp(y)
        y = y - (w + y - s) / (w + 1)
    return y


@_log_omega.defjvp
def _log_omega_jvp(primals, tangents):
    y = _log_omega(*primals)
    return y, tangents[0] / (1 + jnp.exp(y))


def _jeffreys_conjugate(t: Array) -> Array:
    # With w + log w = 1 - t, f* = w + 1/w + t - 2 = 1/w - log w - 1. The slope is u* = 1/w.
    y = _log_omega(1 - t)
    return jnp.expm1(-y) - y


def _pearson_conjugate(t: Array) -> Array:
    t = jnp.maximum(t, -2)
    return t * (t / 4 + 1)


@jax.custom_jvp
def _half_tanh(v: Array) -> Array:
    return jnp.tanh(v) / 2


@_half_tanh.defjvp
def _half_tanh_jvp(primals, tangents):
    # Not (1 - tanh^2) / 2, whose digits are gone far out: all that is left there is tanh's error.
    (v,), (dv,) = primals, tangents
    return _half_tanh(v), 2 * jax.nn.sigmoid(2 * v) * jax.nn.sigmoid(-2 * v) * dv


def _tv_critic(ratio: Array) -> Array:
    return jnp.where(ratio > 1, jnp.inf, jnp.where(ratio < 1, -jnp.inf, 0.0)).astype(ratio.dtype)


F_DIVERGENCES: dict[str, FDivergence] = {
    # KL(P || Q)
    "kl": _entry(
        f=_nonnegative(lambda u: xlogy(u, u)),
        f_of_log=_u_log_u,
        dual="reverse_kl",
        conjugate=lambda t: jnp.exp(t - 1),
        domain=(-math.inf, math.inf),
        activation=lambda v: v,
        conjugate_activation=lambda v: jnp.exp(v - 1),
        optimal_critic=lambda r: 1 + jnp.log(r),
        slope_of_log=lambda x: 1 + x,
    ),
    # KL(Q || P)
    "reverse_kl": _entry(
        f=_nonnegative(lambda u: -jnp.log(u)),
        f_of_log=lambda x: -x,
        dual="kl",
        conjugate=_below(0.0, lambda t: -1 - jnp.log(-t)),
        domain=(-math.inf, 0.0),
        activation=lambda v: -jnp.exp(-v),
        conjugate_activation=lambda v: v - 1,
        optimal_critic=jnp.log,
        slope_of_log=lambda x: -jnp.exp(-x),
    ),
    # (KL(P || M) + KL(Q || M)) / 2 with M = (P + Q) / 2, between 0 and log 2
    "jensen_shannon": _entry(
        f=_nonnegative(lambda u: _jensen_shannon_of_log(jnp.log(u))),
        f_of_log=_jensen_shannon_of_log,
        dual="jensen_shannon",
        # 2 - exp(2t) = -2 expm1(2t - log 2)
        conjugate=_below(LOG_2 / 2, lambda t: -(jnp.log(-jnp.expm1(2 * t - LOG_2)) + LOG_2) / 2),
        domain=(-math.inf, LOG_2 / 2),
        activation=lambda v: (LOG_2 - softplus(-v)) / 2,
        conjugate_activation=lambda v: (softplus(v) - LOG_2) / 2,
        optimal_critic=jnp.log,
        slope_of_log=lambda x: (LOG_2 - softplus(-x)) / 2,
    ),
    # 2 JS - log 4: E_P log sigmoid(V) + E_Q log(1 - sigmoid(V))
    "gan": _entry(
        f=_nonnegative(lambda u: _gan_of_log(jnp.log(u))),
        f_of_log=_gan_of_log,
        dual="gan",
        conjugate=_below(0.0, lambda t: -jnp.log(-jnp.expm1(t))),
        domain=(-math.inf, 0.0),
        activation=lambda v: -softplus(-v),
        conjugate_activation=softplus,
        optimal_critic=jnp.log,
        slope_of_log=lambda x: -softplus(-x),
    ),
    # integral of (p - q)^2 / q
    "pearson": _entry(
        f=_nonnegative(lambda u: jnp.square(u - 1)),
        f_of_log=lambda x: jnp.square(jnp.expm1(x)),
        dual="neyman",
        conjugate=_pearson_conjugate,
        domain=(-math.inf, math.inf),
        activation=lambda v: v,
        conjugate_activation=_pearson_conjugate,
        optimal_critic=lambda r: 2 * (r - 1),
        slope_of_log=lambda x: 2 * jnp.expm1(x),
    ),
    # integral of (p - q)^2 / p
    "neyman": _entry(
        f=_nonnegative(lambda u: jnp.square(1 - u) / u),
        f_of_log=lambda x: 4 * jnp.square(jnp.sinh(x / 2)),
        dual="pearson",
        conjugate=_below(1.0, lambda t: 2 - 2 * jnp.sqrt(1 - t), closed=True),
        domain=(-math.inf, 1.0),
        activation=lambda v: -jnp.expm1(-v),
        conjugate_activation=lambda v: -2 * jnp.expm1(-v / 2),
        optimal_critic=lambda r: 2 * jnp.log(r),
        slope_of_log=lambda x: -jnp.expm1(-2 * x),
    ),
    # integral of (sqrt p - sqrt q)^2, between 0 and 2
    "squared_hellinger": _entry(
        f=_nonnegative(lambda u: jnp.square(jnp.sqrt(u) - 1)),
        f_of_log=lambda x: jnp.square(jnp.expm1(x / 2)),
        dual="squared_hellinger",
        conjugate=_below(1.0, lambda t: t / (1 - t)),
        domain=(-math.inf, 1.0),
        activation=lambda v: -jnp.expm1(-v),
        conjugate_activation=jnp.expm1,
        optimal_critic=lambda r: jnp.log(r) / 2,
        slope_of_log=lambda x: -jnp.expm1(-x / 2),
    ),
    # KL(P || Q) + KL(Q || P)
    "jeffreys": _entry(
        f=_nonnegative(lambda u: (u - 1) * jnp.log(u)),
        f_of_log=lambda x: jnp.expm1(x) * x,
        dual="jeffreys",
        conjugate=_jeffreys_conjugate,
        domain=(-math.inf, math.inf),
        activation=lambda v: v,
        conjugate_activation=_jeffreys_conjugate,
        optimal_critic=lambda r: 1 + jnp.log(r) - 1 / r,
        slope_of_log=lambda x: 1 + x - jnp.exp(-x),
    ),
    # (1/2) integral of |p - q|, between 0 and 1
    "total_variation": _entry(
        # maximum, not abs: its slope at u = 1 is 0
        f=_nonnegative(lambda u: jnp.maximum(u - 1, 1 - u) / 2),
        f_of_log=lambda x: jnp.abs(jnp.expm1(x)) / 2,
        dual="total_variation",
        conjugate=_below(0.5, lambda t: jnp.maximum(t, -0.5), closed=True),
        domain=(-math.inf, 0.5),
        activation=_half_tanh,
        conjugate_activation=_half_tanh,
        optimal_critic=_tv_critic,
    ),
}


# f(u) - f'(1) (u - 1) of log u: the same divergence, as p and q have the same mass, but never
# negative. Averages of f itself have the noise of the mean of u - 1.
_CENTRED = {"kl": _u_log_u_excess, "reverse_kl": exp_excess}


def f_divergence(
    name: str,
    log_p: LogProbFn,
    log_q: LogProbFn,
    samples: Float[Array, "batch *event"],
    *,
    log_proposal: LogProbFn | None = None,
    where: Bool[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Estimate D_f(P || Q) in nats where both densities are known.

        mean over x_i ~ m of q(x_i) f(p(x_i) / q(x_i)) / m(x_i)

    with f(u) - f'(1) (u - 1) in the place of f, which for densities of mass 1 has the same
    expectation (Schulman 2020, "Approximating KL divergence"): no term of the mean is below f(1),
    so that no estimate is negative, and between close laws its noise is of second order.

    `samples` are drawn from Q, or from the law m whose log density `log_proposal` gives: Q's own
    samples see nothing where q is small, and an estimate of `kl`, `pearson` or `jeffreys` from them
    is noisy wherever P is wider than Q; half of the samples from P and half from Q, with
    m = (p + q) / 2, bounds the weights. A grid is a proposal too: with n nodes of spacing h,
    log m = -log(n h) makes this the rectangle rule; on a finite set, log m = -log n makes it exact.

    Log densities may be -infinity: q f(p/q) is q f(0) where p = 0 and p f'(infinity) where q = 0,
    so that disjoint supports give log 2, 1, 2 or infinity. Both log densities return [batch].
    Raises ValueError for an unknown name, no sample, or a log density of another shape.

    >>> x = jax.random.normal(jax.random.key(0), (1000, 1))  # of Q
    >>> log_p, log_q = (lambda x, m=m: -(((x - m) ** 2).sum(-1)) / 2 for m in (0.1, 0.0))
    >>> bool(f_divergence("kl", log_p, log_q, x) < 0.01)
    True
    """
    checks.one_of("divergence", name, F_DIVERGENCES, ALIASES)
    checks.min_rank("samples", samples, 1)
    checks.not_empty("samples", samples)
    lp, lq = at_least_float32(log_p(samples)), at_least_float32(log_q(samples))
    lm = lq if log_proposal is None else at_least_float32(log_proposal(samples))
    for which, value in (("log_p", lp), ("log_q", lq), ("log_proposal", lm)):
        checks.shape(f"{which}(samples)", value, samples.shape[:1])
    if where is not None:
        checks.shape("where", where, samples.shape[:1])
        lp, lq, lm = (jnp.where(where, x, 0) for x in (lp, lq, lm))
    own = "jensen_shannon" if name == "gan" else name
    dual = F_DIVERGENCES[own].dual
    of_log, dual_of_log = (_CENTRED.get(n, F_DIVERGENCES[n].f_of_log) for n in (own, dual))
    # q f(p/q) = p f'(q/p) with the dual generator f': the smaller density over the larger one, so
    # that the ratio never overflows and the larger density carries the weight.
    more_p = lp > lq
    # Not maximum and minimum, whose derivatives at a tie are halves of both.
    larger, smaller = jnp.where(more_p, lp, lq), jnp.where(more_p, lq, lp)
    nowhere = larger == -jnp.inf
    log_ratio = jnp.where(nowhere, 0, smaller) - jnp.where(nowhere, 0, larger)
    value = jnp.where(more_p, dual_of_log(log_ratio), of_log(log_ratio))
    if name == "gan":  # 2 JS - log 4, of mass q
        value = 2 * value - LOG_4 * jnp.where(more_p, jnp.exp(log_ratio), 1)
    weight = jnp.exp(jnp.where(nowhere, -jnp.inf, larger - lm))
    # A weight of 0 times an infinite ratio is 0: neither law has mass there.
    return masked_mean(jnp.where(weight > 0, weight * value, 0), where)
