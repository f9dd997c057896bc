"""Planar and radial maps: one ridge, one bump, kept invertible by reparametrisation."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks, numerics
from genjax.flows.bijections.base import Bijection, Number, check_tree
from genjax.typing import Params, PRNGKey

__all__ = ["planar", "planar_init", "radial", "radial_init"]

# The steepest ridge allowed: w.u_hat >= -1 + this, so that float32 can still invert it.
_MARGIN = 1e-4


def _vectors(name: str, x: Array) -> int:
    checks.rank(f"the event of {name} with its batch axis", x, 2)
    return x.shape[-1]


def _dot(x: Array, w: Array) -> Array:
    return jnp.matmul(x, w, precision=numerics.HIGHEST)


def planar_init(key: PRNGKey, dim: int, scale: Number = 0.1) -> Params:
    """Draw planar parameters {"w" [dim], "u" [dim], "b" []}: w normal, u small.

    >>> sorted(planar_init(jax.random.key(0), 2))
    ['b', 'u', 'w']
    """
    key_w, key_u = jax.random.split(key)
    w = jax.random.normal(key_w, (dim,)) / dim**0.5
    return {"w": w, "u": scale * jax.random.normal(key_u, (dim,)), "b": jnp.zeros(())}


def planar(*, constrained: bool = True) -> Bijection:
    """y = x + u^ tanh(w.x + b), log |det| = log |1 + (1 - tanh^2(w.x + b)) w.u^|.

    Rezende and Mohamed (2015), eqs (10)-(12); u^ = u + (m(w.u) - w.u) w / |w|^2 with
    m(t) = -1 + softplus(t) (appendix A.1) keeps w.u^ > -1, so the map is invertible: w.x solves
    a + w.u^ tanh(a + b) = w.y, one monotone equation, by bracketed Newton steps. With
    `constrained=False` u^ = u; the map may then fold, and `inverse` raises ValueError.
    Parameters: {"w" [d], "u" [d], "b" []}; events [d].

    >>> params = planar_init(jax.random.key(0), 2)
    >>> y, log_det = planar().forward(params, jnp.ones((4, 2)))
    >>> y.shape, log_det.shape
    ((4, 2), (4,))
    """

    def prepare(params: Params, x: Array) -> tuple[Array, Array, Array, Array]:
        dim = _vectors("planar", x)
        check_tree("planar", params, {"w": (dim,), "u": (dim,), "b": ()})
        w, u, b = params["w"], params["u"], params["b"]
        slope = _dot(w, u)
        if constrained:
            wanted = jnp.maximum(jax.nn.softplus(slope), _MARGIN) - 1
            square = _dot(w, w)
            # w = 0 leaves a shift by u tanh(b): nothing to correct, nothing to divide by.
            zero = square == 0
            gap = jnp.where(zero, 0, wanted - slope) / jnp.where(zero, 1, square)
            u, slope = u + gap * w, jnp.where(zero, 0, wanted)
        return w, u, b, slope

    def log_det(t: Array, slope: Array) -> Array:
        return jnp.log(jnp.abs(1 + (1 - jnp.square(t)) * slope))

    def forward(params: Params, x: Array) -> tuple[Array, Array]:
        w, u, b, slope = prepare(params, x)
        t = jnp.tanh(_dot(x, w) + b)
        return x + u[None] * t[:, None], log_det(t, slope)

    def inverse(params: Params, y: Array) -> tuple[Array, Array]:
        if not constrained:
            raise ValueError("planar(constrained=False) need not be invertible: it has no inverse")
        w, u, b, slope = prepare(params, y)
        t = jnp.tanh(_solve_ridge(_dot(y, w), slope, b) + b)
        return y - u[None] * t[:, None], -log_det(t, slope)

    return Bijection(forward, inverse)


def _solve_ridge(target: Array, slope: Array, b: Array) -> Float[Array, " batch"]:
    """Solve a + slope tanh(a + b) = target for a, where slope > -1.

    Newton inside a bracket, bisecting wherever a step would leave it. The search is not
    differentiated: one more Newton step from the root carries the gradient (implicit function).
    """
    fixed, c, shift = jax.lax.stop_gradient((target, slope, b))

    def residual(a: Array) -> tuple[Array, Array]:
        t = jnp.tanh(a + shift)
        return a + c * t - fixed, 1 + c * (1 - jnp.square(t))

    def step(_: Any, bracket: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, a = bracket
        value, derivative = residual(a)
        low, high = jnp.where(value < 0, a, low), jnp.where(value < 0, high, a)
        newton = a - value / derivative
        usable = (newton > low) & (newton < high)
        return low, high, jnp.where(usable, newton, (low + high) / 2)

    reach = jnp.abs(c)
    num_steps = 60 if fixed.dtype == jnp.float64 else 40
    _, _, a = jax.lax.fori_loop(0, num_steps, step, (fixed - reach, fixed + reach, fixed))
    a = jax.lax.stop_gradient(a)
    derivative = residual(a)[1]
    return a - (a + slope * jnp.tanh(a + b) - target) / derivative


def radial_init(key: PRNGKey, dim: int) -> Params:
    """Draw radial parameters {"z0" [dim], "alpha" [], "beta" []} that start as the identity.

    >>> sorted(radial_init(jax.random.key(0), 2))
    ['alpha', 'beta', 'z0']
    """
    # softplus(beta) = softplus(alpha) makes beta^ zero.
    raw = jnp.full((), 0.5413)
    return {"z0": jax.random.normal(key, (dim,)), "alpha": raw, "beta": raw}


def radial() -> Bijection:
    """y = x + beta^ h (x - z0), h = 1 / (alpha + r), r = |x - z0|.

    log |det| = (d - 1) log(1 + beta^ h) + log(1 + beta^ h - beta^ h^2 r). Rezende and Mohamed
    (2015), eq. (14); alpha = softplus(params["alpha"]), beta^ = -alpha + softplus(params["beta"])
    (appendix A.2) keep it invertible. The radius solves a quadratic, so the inverse is exact.
    Parameters: {"z0" [d], "alpha" [], "beta" []}; events [d].

    >>> params = radial_init(jax.random.key(0), 2)
    >>> y, log_det = radial().forward(params, jnp.ones((4, 2)))
    >>> y.shape, log_det.shape
    ((4, 2), (4,))
    """

    def prepare(params: Params, x: Array) -> tuple[Array, Array, Array, Array]:
        dim = _vectors("radial", x)
        check_tree("radial", params, {"z0": (dim,), "alpha": (), "beta": ()})
        # alpha and alpha + beta^, both positive whatever the raw numbers are.
        alpha = jnp.maximum(jax.nn.softplus(params["alpha"]), _MARGIN)
        total = jnp.maximum(jax.nn.softplus(params["beta"]), _MARGIN)
        offset = x - params["z0"][None]
        return alpha, total, offset, numerics.safe_norm(offset, axis=-1)

    def log_det(r: Array, alpha: Array, total: Array, dim: int) -> Array:
        outer = jnp.log(r + total) - jnp.log(r + alpha)
        inner = jnp.log(r * (r + 2 * alpha) + alpha * total) - 2 * jnp.log(r + alpha)
        return (dim - 1) * outer + inner

    def forward(params: Params, x: Array) -> tuple[Array, Array]:
        alpha, total, offset, r = prepare(params, x)
        y = x + ((total - alpha) / (alpha + r))[:, None] * offset
        return y, log_det(r, alpha, total, x.shape[-1])

    def inverse(params: Params, y: Array) -> tuple[Array, Array]:
        alpha, total, offset, far = prepare(params, y)
        # |y - z0| = r (r + total) / (r + alpha): the positive root of r^2 + p r - alpha far = 0.
        p = total - far
        root = jnp.sqrt(jnp.square(p) + 4 * alpha * far)
        r = jnp.where(p > 0, 2 * alpha * far / (p + root), (root - p) / 2)
        x = params["z0"][None] + ((r + alpha) / (r + total))[:, None] * offset
        return x, -log_det(r, alpha, total, y.shape[-1])

    return Bijection(forward, inverse)
