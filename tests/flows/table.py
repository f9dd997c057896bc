"""One table of every bijection: what builds it, parameters for it, and points to try it at."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax import flows
from genjax.flows import Bijection


class Entry(NamedTuple):
    """A bijection with parameters and a batch of points in its domain."""

    bijection: Bijection
    params: object
    x: jax.Array


def dense(key, sizes):
    """Weights of a small tanh network; the spread keeps log-scales of order one."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (i, o)) / np.sqrt(i), 0.1 * jax.random.normal(k, (o,)))
        for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def mlp(params, x):
    for i, (w, b) in enumerate(params):
        x = x @ w + b.reshape((1,) * (x.ndim - 1) + (-1,))
        x = jnp.tanh(x) if i < len(params) - 1 else x
    return x


def causal(params, x):
    """Raw parameters at t from the numbers before t: strictly lower triangular products."""
    weight, bias = params
    mask = np.tril(np.ones(weight.shape[1:], weight.dtype), -1)
    raw = jnp.tanh(jnp.einsum("bj,kij->bki", x, weight * mask[None])) + bias[None]
    return raw.reshape(x.shape[0], -1)


def causal_params(key, size, d):
    k1, k2 = jax.random.split(key)
    return jax.random.normal(k1, (size, d, d)), 0.5 * jax.random.normal(k2, (size, d))


def field(params, x, t):
    hidden = jnp.concatenate([x, t[:, None]], axis=1)
    return 0.5 * mlp(params, hidden)


def points(key, *shape, scale=2.0):
    return scale * jax.random.normal(key, (4, *shape))


def _planar(key, d=4):
    return Entry(flows.planar(), flows.planar_init(key, d, scale=2.0), points(key, d))


def _radial(key, d=4):
    params = flows.radial_init(key, d) | {"beta": jnp.asarray(3.0)}
    return Entry(flows.radial(), params, points(key, d))


def _coupling(transformer, *, swap=False, d=4):
    def build(key):
        params = dense(key, (d // 2, 8, transformer.size * (d // 2)))
        return Entry(flows.coupling(mlp, transformer, swap=swap), params, points(key, d))

    return build


def _alternating(key):
    keys = jax.random.split(key, 4)
    params = [dense(k, (2, 8, 4)) for k in keys[:3]]
    return Entry(flows.alternating_couplings([mlp] * 3, flows.affine()), params, points(keys[3], 4))


def _checkerboard(key):
    mask = np.indices((2, 2, 1)).sum(0) % 2 == 0
    transformer = flows.affine()

    def conditioner(params, x):
        return mlp(params, x.reshape(x.shape[0], 4)).reshape(*x.shape[:-1], -1)

    params = dense(key, (4, 8, 4 * transformer.size))
    return Entry(
        flows.masked_coupling(conditioner, transformer, mask), params, points(key, 2, 2, 1)
    )


def _autoregressive(transformer, d=3):
    def build(key):
        params = causal_params(key, transformer.size, d)
        return Entry(flows.masked_autoregressive(causal, transformer), params, points(key, d))

    return build


def _elementwise(key):
    spline = flows.rational_quadratic(4)
    params = jax.random.normal(key, (spline.size, 4))
    return Entry(flows.elementwise(spline), params, points(key, 4))


def _actnorm(key):
    x = points(key, 2, 2, 3) + 1
    return Entry(flows.actnorm(), flows.actnorm_init(x), x)


def _plu(key):
    order, params = flows.plu_init(flows.random_rotation(0, 3) * np.array([[1.0], [2.0], [0.5]]))
    return Entry(flows.plu(order), params, points(key, 2, 1, 3))


def _multi_scale(key):
    keys = jax.random.split(key, 2)
    squeezed = flows.chain([flows.actnorm(), flows.squeeze()])
    x = points(keys[1], 2, 2, 2)
    order, params = flows.plu_init(flows.random_rotation(1, 4))
    return Entry(
        flows.multi_scale([squeezed, flows.plu(order)]),
        [[flows.actnorm_init(x), None], params],
        x,
    )


def _chain(key):
    keys = jax.random.split(key, 3)
    planar, coupling = _planar(keys[0]), _coupling(flows.affine())(keys[1])
    return Entry(
        flows.chain([planar.bijection, flows.permutation([2, 0, 3, 1]), coupling.bijection]),
        [planar.params, None, coupling.params],
        points(keys[2], 4),
    )


def _repeat(key):
    params = jax.vmap(lambda k: flows.planar_init(k, 4, scale=2.0))(jax.random.split(key, 5))
    return Entry(flows.repeat(flows.planar()), params, points(key, 4))


def _plain(bijection, *shape, uniform=False):
    def build(key):
        x = jax.random.uniform(key, (4, *shape)) if uniform else points(key, *shape)
        return Entry(bijection, None, x)

    return build


def _continuous(key):
    return Entry(flows.continuous_flow(field, num_steps=24), dense(key, (3, 8, 2)), points(key, 2))


TABLE: dict[str, Callable[[jax.Array], Entry]] = {
    "planar": _planar,
    "radial": _radial,
    "inverted radial": lambda key: _radial(key)._replace(bijection=flows.invert(flows.radial())),
    "affine coupling": _coupling(flows.affine()),
    "standardising coupling, swapped": _coupling(flows.standardise(), swap=True),
    "spline coupling": _coupling(flows.rational_quadratic(5, -3.0, 3.0)),
    "alternating couplings": _alternating,
    "checkerboard coupling": _checkerboard,
    "autoregressive affine": _autoregressive(flows.affine()),
    "autoregressive spline": _autoregressive(flows.rational_quadratic(4)),
    "elementwise": _elementwise,
    "actnorm": _actnorm,
    "plu": _plu,
    "squeeze": _plain(flows.squeeze(), 2, 4, 1),
    "split": _plain(flows.split(), 4),
    "multi-scale": _multi_scale,
    "permutation": _plain(flows.permutation([2, 0, 1]), 3),
    "rescale": _plain(flows.rescale(0.0, 17.0), 3),
    "logit": _plain(flows.logit(), 3, uniform=True),
    "chain": _chain,
    "repeat": _repeat,
    "continuous": _continuous,
}


@functools.cache
def entry(name: str) -> Entry:
    """The entry with parameters and points in float32, made by one program."""
    kept = []

    def make(key):
        bijection, params, x = TABLE[name](key)
        kept.append(bijection)
        return params, x

    with jax.enable_x64(False):
        params, x = jax.device_get(jax.jit(make)(jax.random.key(3)))
    return Entry(kept[0], params, x)
