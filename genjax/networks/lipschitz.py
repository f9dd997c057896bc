"""Critics with a bounded Lipschitz constant: spectral normalisation, and 1-Lipschitz layers.

Spectral normalisation divides each weight by an estimate of its largest singular value, the
spectral penalty sums the estimates; as pure functions on a tree of parameters they fit any network.
`LipschitzMLP` is 1-Lipschitz by construction: orthonormal weights and sorting activations, which
also keep the gradient's norm.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import HIGHEST, at_least_float32, safe_norm, safe_sqrt
from genjax.typing import Params, PRNGKey

__all__ = [
    "LipschitzMLP",
    "OrthonormalDense",
    "bjorck",
    "group_sort",
    "init_power",
    "max_min",
    "power_iteration",
    "spectral_normalise",
    "spectral_penalty",
]

# path of a weight in the tree -> left singular vector, the estimate so far
PowerState = dict[str, Array]


def power_iteration(
    weight: Float[Array, "out inputs"], u: Float[Array, " out"], *, num_steps: int = 1
) -> tuple[Float[Array, ""], Float[Array, " out"]]:
    """Estimate the largest singular value: v = W'u / |W'u|, u = Wv / |Wv|, sigma = u'Wv.

    Returns (sigma, the new u of u's type). u and v are constants to the gradient, so that
    d sigma / dW = u v'. All is done in float32 at least. Where W'u is 0, as for a weight of zeros,
    sigma is 0 and u stays, so that the estimate recovers. Miyato et al. 2018 (arXiv:1802.05957),
    Algorithm 1.

    >>> sigma, u = power_iteration(jnp.diag(jnp.array([3.0, 1.0])), jnp.ones(2), num_steps=20)
    >>> round(float(sigma), 3)
    3.0
    """
    checks.integer("num_steps", num_steps, 1)
    weight = at_least_float32(weight)
    fixed = stop_gradient(weight)

    def step(_: Any, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        v = _unit(jnp.matmul(pair[0], fixed, precision=HIGHEST))
        image = jnp.matmul(fixed, v, precision=HIGHEST)
        return jnp.where(jnp.any(image != 0), _unit(image), pair[0]), v

    start = stop_gradient(u).astype(weight.dtype), jnp.zeros_like(fixed[0])
    new, v = jax.lax.fori_loop(0, num_steps, step, start)
    return jnp.einsum("o,oi,i->", new, weight, v, precision=HIGHEST), new.astype(u.dtype)


def init_power(params: Params, key: PRNGKey) -> PowerState:
    """Draw a random unit vector u for every weight (leaf named `kernel` or `embedding`, rank 2 at
    least).

    >>> list(init_power({"kernel": jnp.ones((3, 2))}, jax.random.key(0)))
    ["['kernel']"]
    """
    return {
        path: _unit(jax.random.normal(jax.random.fold_in(key, i), w.shape[-1:], w.dtype))
        for i, (path, w) in enumerate(_weights(params).items())
    }


def spectral_normalise(
    params: Params, power: PowerState, *, num_steps: int = 1
) -> tuple[Params, PowerState]:
    """Divide every weight by its estimated largest singular value; returns (params, new power).

    A convolution's kernel [h, w, in, out] is taken as the matrix [out, h w in]: the usual
    convention, which is not the norm of the convolution as an operator. The embeddings of a
    projection critic, leaves named `embedding`, are weights too (Miyato, Koyama 2018). Keep the new
    power state for the next call once per update, in the carry of the training state; it gets no
    gradient. A weight of zeros stays 0. Miyato et al. 2018, section 2.1.

    >>> params = {"kernel": 3 * jnp.eye(2)}
    >>> power = init_power(params, jax.random.key(0))
    >>> params, power = spectral_normalise(params, power, num_steps=20)
    >>> params["kernel"].round(3)
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    sigmas, updated = _largest(params, power, num_steps)

    def divide(path: Any, leaf: Array) -> Array:
        sigma = sigmas.get(jax.tree_util.keystr(path))
        if sigma is None:
            return leaf
        return (leaf / jnp.where(sigma > 0, sigma, 1)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(divide, params), updated


def spectral_penalty(
    params: Params, power: PowerState, *, num_steps: int = 1
) -> tuple[Float[Array, ""], PowerState]:
    """Sum the estimated largest singular values of all weights; returns (the sum, new power).

        sum_i sigma_max(W_i), with the gradient u_i v_i' for W_i

    Added to a loss with a weight near 0.1, it keeps the layers smooth, so that a hierarchy's
    divergences do not run away where a posterior moves. Weights and the power state are those of
    `spectral_normalise`; no weights give 0. Vahdat, Kautz 2020 (arXiv:2007.03898), section 3.2.

    >>> params = {"kernel": jnp.diag(jnp.array([3.0, 1.0]))}
    >>> penalty, power = spectral_penalty(
    ...     params, init_power(params, jax.random.key(0)), num_steps=20
    ... )
    >>> round(float(penalty), 3)
    3.0
    """
    sigmas, updated = _largest(params, power, num_steps)
    return sum(sigmas.values(), start=jnp.float32(0)), updated


def group_sort(
    x: Float[Array, "*batch features"], size: int = 2
) -> Float[Array, "*batch features"]:
    """Sort the features, ascending, within contiguous groups of `size`; gradient norm is kept.

    Anil, Lucas, Grosse 2019 (arXiv:1811.05381), section 4.2. Raises ValueError where `size` does
    not divide the features.

    >>> group_sort(jnp.array([[3.0, 1.0, 2.0, 5.0]]))
    Array([[1., 3., 2., 5.]], dtype=float32)
    """
    checks.integer("size", size, 1)
    if x.shape[-1] % size:
        raise ValueError(f"size must divide the {x.shape[-1]} features, got {size}")
    groups = x.reshape(*x.shape[:-1], -1, size)
    if size == 2:  # much cheaper than a sort
        a, b = groups[..., 0], groups[..., 1]
        first = a <= b  # one choice for both, so that a tie splits no gradient
        ordered = jnp.stack([jnp.where(first, a, b), jnp.where(first, b, a)], axis=-1)
    else:
        ordered = jnp.sort(groups, axis=-1)
    return ordered.reshape(x.shape)


def max_min(x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
    """GroupSort in pairs, the larger first: (x0, x1) -> (max, min).

    >>> max_min(jnp.array([[3.0, 1.0, 2.0, 5.0]]))
    Array([[3., 1., 5., 2.]], dtype=float32)
    """
    return group_sort(x, 2).reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)


def bjorck(
    weight: Float[Array, "inputs out"], *, num_steps: int = 15, order: int = 2
) -> Float[Array, "inputs out"]:
    """Bring a matrix to the nearest one with orthonormal rows or columns, by matrix products.

        order 1: W <- (3 W - W W'W) / 2
        order 2: W <- (15 W - 10 W W'W + 3 W (W'W)^2) / 8

    W is first divided by a bound on its norm, sqrt of the largest row sum of |G| with G the
    smaller Gram matrix: 1 where W is orthonormal already. Singular values then lie in (0, 1] and
    rise towards 1 without passing it: the result has norm at most 1, up to rounding, after any
    number of steps. Small ones grow by 3/2 (15/8) a step. A vector is divided by its norm. A
    matrix of zeros stays 0, with a finite gradient.
    Bjorck & Bowie 1971; Anil et al. 2019, section 4.3.

    >>> w = bjorck(jnp.array([[2.0, 0.0], [1.0, 1.0]]))
    >>> (w @ w.T).round(3) + 0.0
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    checks.rank("weight", weight, 2)
    checks.integer("num_steps", num_steps, 1)
    checks.one_of("order", order, (1, 2))
    tall = weight.shape[0] >= weight.shape[1]
    w = weight.T if tall else weight  # rows are the short side

    def gram(w: Array) -> Array:
        return jnp.matmul(w, w.T, precision=HIGHEST)

    # The result does not depend on the scale: without it, squares neither overflow nor vanish.
    w = _over(w, stop_gradient(jnp.max(jnp.abs(w))))
    bound = safe_sqrt(jnp.max(jnp.sum(jnp.abs(gram(w)), axis=1)))
    # A little above the bound: rounding must not push the largest singular value over 1.
    w = _over(w, bound * (1 + 4 * jnp.finfo(w.dtype).eps))

    def iterate(w: Array, _: None) -> tuple[Array, None]:
        g = gram(w)
        gw = jnp.matmul(g, w, precision=HIGHEST)
        if order == 1:
            return 1.5 * w - 0.5 * gw, None
        return (15 * w - 10 * gw + 3 * jnp.matmul(g, gw, precision=HIGHEST)) / 8, None

    if w.shape[0] == 1:
        w = _over(w, safe_norm(w))
    else:
        w = jax.lax.scan(iterate, w, None, length=num_steps)[0]
    return w.T if tall else w


class OrthonormalDense(nn.Module):
    """Dense layer whose weight is orthonormalised at every call, so that its norm is at most 1."""

    features: int
    num_steps: int = 15
    order: int = 2
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch features"]:
        shape = (x.shape[-1], self.features)
        weight = self.param("kernel", nn.initializers.orthogonal(), shape)
        y = jnp.matmul(
            x, bjorck(weight, num_steps=self.num_steps, order=self.order), precision=HIGHEST
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class LipschitzMLP(nn.Module):
    """Critic [batch, *event] -> [batch] that is 1-Lipschitz in the event's Euclidean norm.

    Orthonormal dense layers with GroupSort between them, and a last weight of norm 1. Where no
    layer widens, its gradient has norm 1 almost everywhere: back-propagation multiplies by W^T,
    which keeps a norm where W W^T = I, W [inputs, features], and projects where features exceed
    inputs. Anil, Lucas, Grosse 2019.
    """

    features: tuple[int, ...] = (64, 64, 64)
    group: int = 2
    num_steps: int = 15
    order: int = 2

    @nn.compact
    def __call__(self, x: Float[Array, "batch *event"]) -> Float[Array, " batch"]:
        h = x.reshape(x.shape[0], -1)
        for width in self.features:
            h = OrthonormalDense(width, self.num_steps, self.order)(h)
            h = group_sort(h, self.group)
        return OrthonormalDense(1, self.num_steps, self.order)(h)[:, 0]


def _largest(
    params: Params, power: PowerState, num_steps: int
) -> tuple[dict[str, Array], PowerState]:
    """The estimated largest singular value of each weight by its path, and the new power state."""
    weights = _weights(params)
    if missing := weights.keys() - power.keys():
        raise ValueError(f"power must come from init_power of these params; it lacks {missing}")
    sigmas, updated = {}, dict(power)
    for path, weight in weights.items():
        matrix = weight.reshape(-1, weight.shape[-1]).T
        sigmas[path], updated[path] = power_iteration(matrix, power[path], num_steps=num_steps)
    return sigmas, updated


def _over(x: Array, size: Array) -> Array:
    """x / size; x itself where the size is 0."""
    return x / jnp.where(size > 0, size, 1).astype(x.dtype)


def _unit(x: Array) -> Array:
    """x / |x|, 0 where x is 0; scaled first, so that the squares of small numbers do not vanish."""
    x = _over(x, jnp.max(jnp.abs(x)))
    return _over(x, safe_norm(x))


def _weights(params: Params) -> dict[str, Array]:
    """Collect the weights by their path: `kernel` and `embedding` leaves, of rank 2 at least."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    names = ("['kernel']", "['embedding']")
    return {n: w for n, w in named.items() if n.endswith(names) and jnp.ndim(w) >= 2}
