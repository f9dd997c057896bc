"""What is read off potentials, in one pass over the plan.

The plan is P_ij = c_i b_j exp((g_j - C_ij) / epsilon). Its rows sum to a, whatever g is, unless a
row potential is given beside it. The dual objective <a, f> + <b, g> - epsilon (sum P - 1) is taken
without its last term where that is 0, and by differences of potentials where it is not.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax.numerics import HIGHEST
from genjax.transport import blocks as passes
from genjax.transport.problem import Method, Problem


class Potentials(NamedTuple):
    """Column potentials g = base + gain, where the difference of base and cost lost nothing.

    The row potential is the update of g, unless `own` is True: then it is f.
    """

    base: Array
    gain: Array
    f: Array | None = None
    own: Array | None = None


class Reading(NamedTuple):
    """f and g: the potentials, <a, f> = <b, g>. value: the dual objective. slack: of the
    value, that is not in <a, f> + <b, g>. cost: <P, C>.

    error: L1, of both marginals, and what the rounding of f and g may add to it. information:
    KL(P | a b^T), the derivative of the value for epsilon. gradient: of <P, C> at fixed P, for
    each of the problem's arrays. The last two are None where they are not wanted.
    """

    f: Array
    g: Array
    value: Array
    slack: Array
    cost: Array
    error: Array
    information: Array | None
    gradient: tuple[Array | None, ...]


def read(
    method: Method,
    problem: Problem,
    potentials: Potentials,
    large: Array,
    wanted: tuple[bool, ...] = (),
    informed: bool = False,
) -> Reading:
    """Read potentials; gradients for `wanted` arrays, and for epsilon if `informed`."""
    blocks = problem.blocks(method)
    a, b, epsilon = problem.a, problem.b, problem.epsilon
    base, gain, own_f, own = potentials
    others = blocks.arrays[1:]
    wanted = wanted or tuple(False for _ in blocks.arrays)
    one = large.astype(a.dtype)

    def body(carry, block):
        cols, grads = carry
        rows, a, f = block
        if blocks.cost_fn is None:
            cost, pull = rows, _identity
        else:
            cost, pull = jax.vjp(blocks.cost_fn, rows, *others)
        w, peak = passes.row_exponentials(cost, base, gain, b, epsilon, large)
        total = jnp.matmul(w, b, precision=HIGHEST)
        log_total = passes.log_sum(total, large)
        update = -(peak + epsilon * log_total)
        gap = 0 * update if own is None else jnp.where(own, f - update, 0)
        log_scale = gap / epsilon - log_total
        scale = jnp.exp(log_scale)
        density = w + one
        spent = jnp.matmul(density * cost, b, precision=HIGHEST)
        seen = {"update": update, "gap": gap, "total": scale * total, "cost": scale * spent}
        if informed:
            s = (base[None, :] - cost) - peak[:, None] + gain[None, :]
            s = _relative(s / epsilon + log_scale[:, None])
            seen["information"] = jnp.matmul(s, b, precision=HIGHEST)
        if any(wanted):
            pulled = pull((a * scale)[:, None] * (density * b[None, :]))
            seen["first"] = pulled[0] if wanted[0] else None  # pyright: ignore
            grads = tuple(
                acc + new if want else None
                for acc, new, want in zip(grads, pulled[1:], wanted[1:], strict=True)
            )
        return (cols + jnp.matmul(a * scale, w, precision=HIGHEST), grads), seen

    grads = tuple(jnp.zeros_like(z) if w else None for z, w in zip(others, wanted[1:], strict=True))
    f = jnp.zeros_like(a) if own_f is None else own_f
    xs = (blocks.rows(), blocks.split(a, 0.0), blocks.split(f))
    carry = (jnp.zeros_like(b), grads)
    (cols, grads), seen = passes.scan(body, carry, xs, blocks.count)
    rows = {name: None if z is None else blocks.join(z) for name, z in seen.items()}
    return Reading(
        *_dual(method, problem, potentials, rows, cols, large),
        information=passes.sums(a, rows["information"])[0] if informed else None,  # pyright: ignore
        gradient=(rows.get("first"), *grads),
    )


def _dual(method: Method, problem: Problem, potentials: Potentials, rows, cols, large):
    """The first fields of a `Reading`: of a fixed number of iterations, the potentials as they are.

    Where epsilon is large the rounding of a sweep is epsilon times that of 1. One more update of
    the columns, known from their excess, takes it out, and makes the columns exact.
    """
    _, a, b, epsilon, *_ = problem
    f, g = rows["update"] + rows["gap"], potentials.base + potentials.gain
    both = [f, jnp.abs(f), rows["total"], rows["cost"]]
    if potentials.own is not None:
        excess = jnp.expm1(rows["gap"] / epsilon)
        both += [excess, jnp.abs(excess)]
    on_f, size_f, slack, cost, *inexact = passes.sums(a, *both)
    off, error = inexact or (0 * epsilon, 0 * epsilon)
    # P^T 1 / b - 1: rows whose sums are exact add up to 1 whatever the rounding.
    excess = cols - slack + off
    change = epsilon * passes.log_sum(jnp.where(large, excess, 0), jnp.full_like(large, True))
    on_g, size_g, missing, moved = passes.sums(b, g, jnp.abs(g), jnp.abs(excess), change)
    slack = jnp.where(large, -moved, -epsilon * off)
    value = on_f + on_g + slack
    if method.num_iterations is None:
        level = (on_g - moved - on_f) / 2
        f, g = f + level, g - change - level
        slack = jnp.where(large, 0, slack)
        if method.symmetric:  # f was g
            f = g
    rounding = jnp.finfo(f.dtype).eps * (size_f + size_g) / (4 * epsilon)
    return f, g, value, slack, cost, error + missing + rounding


def _identity(p: Array) -> tuple[Any, ...]:
    return (p,)


def _relative(s: Array) -> Array:
    """e^s (s - 1) + 1, the integrand of KL(P | a b^T) for P = a b e^s; never negative."""
    s = jnp.minimum(s, passes.CEILING)
    series = jnp.zeros_like(s)
    for k in range(8, 1, -1):
        series = (k - 1) / math.factorial(k) + s * series
    return jnp.where(jnp.abs(s) < 0.1, s * s * series, jnp.exp(s) * (s - 1) + 1)
