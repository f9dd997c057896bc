"""Convolutions that are matrix products on CPU, as a function and as a linen module."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from genjax.sharding import gathered, split_batch

Padding = Literal["SAME"] | tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: Float[Array, "batch height width inputs"],
    kernel: Float[Array, "rows columns inputs outputs"],
    stride: int = 1,
    padding: Padding = "SAME",
) -> Float[Array, "batch rows_out columns_out outputs"]:
    """Cross-correlate with zeros beyond the border: y_p = sum_q x_{stride p + q} kernel_q.

    padding: `SAME`, or zeros before and after, ((top, bottom), (left, right)).
    On CPU as a matrix product: XLA takes up to ten times as long there for a convolution's
    gradient, and fifty times in a loop. Summed in float32 at least, rounded once.
    """
    dtype = jnp.result_type(x, kernel)
    return jax.lax.platform_dependent(
        x.astype(dtype),
        kernel.astype(dtype),
        cpu=partial(_by_product, stride=stride, padding=padding),
        default=partial(_by_convolution, stride=stride, padding=padding),
    )


def _by_convolution(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=layout
    )


def _by_product(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """One product of flat matrices.

    Without a stride the columns around a pixel are its factors, and the results of the kernel's
    rows are moved and added: a third of the copies that whole patches need.
    """
    rows, columns, inputs, outputs = kernel.shape
    dtype = jnp.result_type(x, kernel)
    product = partial(jnp.matmul, preferred_element_type=jnp.promote_types(dtype, jnp.float32))
    batch, height, width, _ = x.shape
    pads: Any = padding
    if padding == "SAME":
        pads = jax.lax.padtype_to_pads((height, width), (rows, columns), (stride, stride), "SAME")
    high = (height + sum(pads[0]) - rows) // stride + 1
    wide = (width + sum(pads[1]) - columns) // stride + 1

    def across(x: Array) -> list[Array]:
        x = jnp.pad(x, ((0, 0), (0, 0), pads[1], (0, 0)))
        return [x[:, :, j : j + stride * (wide - 1) + 1 : stride] for j in range(columns)]

    def down(y: Array) -> list[Array]:
        y = jnp.pad(y, ((0, 0), pads[0], (0, 0), (0, 0)))
        return [y[:, i : i + stride * (high - 1) + 1 : stride] for i in range(rows)]

    if stride > 1:
        patches = jnp.concatenate([part for row in down(x) for part in across(row)], axis=-1)
        flat = patches.reshape(-1, rows * columns * inputs)
        y = product(flat, kernel.reshape(-1, outputs))
        return y.reshape(batch, high, wide, outputs).astype(dtype)
    factors = jnp.concatenate(across(x), axis=-1).reshape(-1, columns * inputs)
    weights = jnp.moveaxis(kernel, 0, 2).reshape(columns * inputs, rows * outputs)
    y = product(factors, weights).reshape(batch, height, wide, rows * outputs)
    moved = [part[..., i * outputs : (i + 1) * outputs] for i, part in enumerate(down(y))]
    return reduce(jnp.add, moved).astype(dtype)


class Conv(nn.Module):
    """`nn.Conv` of images with `SAME` padding, of the same parameters and types, by `convolve`."""

    features: int
    kernel_size: Sequence[int] = (3, 3)
    stride: int = 1
    use_bias: bool = True
    dtype: Any = None
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width inputs"]) -> Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel = split_batch(x), gathered(kernel)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = convolve(x, kernel, self.stride)
        return y if bias is None else y + bias.reshape(1, 1, 1, -1)
