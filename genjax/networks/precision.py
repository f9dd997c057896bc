"""Half precision for linen networks that were not written for it."""

from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from genjax.networks.convolution import Conv

__all__ = ["computing_in"]

# What multiplies matrices: their inputs are cast.
PRODUCTS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvTranspose, nn.Embed, Conv)


def computing_in(dtype: Any) -> AbstractContextManager[None]:
    """Within this context products of linen modules take inputs of `dtype`, networks give float32.

    For a loss under `compute_dtype` of the train step, which casts the parameters: the noise, the
    times and the scaled data that the loss computes stay float32 until a layer multiplies them,
    and the network's results are float32 again.

        def loss(params, key, batch):
            with computing_in(jnp.bfloat16):
                return loss_fn(params, key, batch)

    >>> import flax.linen as nn
    >>> with computing_in(jnp.bfloat16):
    ...     y = nn.Dense(2).init_with_output(jax.random.key(0), jnp.ones((1, 3)))[0]
    >>> y.shape
    (1, 2)
    """

    def cast(to: Any, tree: Any) -> Any:
        floating = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(to) if floating(x) else x, tree)

    # Calls under way: scanned blocks are applied as modules of their own within a network's call.
    depth = 0

    def intercept(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        nonlocal depth
        if isinstance(context.module, PRODUCTS):
            args = cast(dtype, args)
        depth += 1
        try:
            result = call(*args, **kwargs)
        finally:
            depth -= 1
        return cast(jnp.float32, result) if depth == 0 else result

    return nn.intercept_methods(intercept)
