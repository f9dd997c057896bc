"""A causal transformer over grids of codes, in which each code sees its neighbours directly."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from genjax.networks.layers import Norm, drop, on_flat
from genjax.networks.transformer import Block, apply_stack, empty_cache, stacked


def neighbours(grids: list[tuple[int, int]], stages: int) -> tuple[tuple[int, ...], ...]:
    """For each code of the row of all (`tokens_of`) the numbers of some before it, -1 for none.

    The one before it; of its own level those to the left, above left, above and above right; of the
    level above the one at its place and the four beside that. Each at the same stage.
    """
    starts = [0, grids[0][0] * grids[0][1] * stages]

    def number(level: int, i: int, j: int, stage: int) -> int:
        rows, columns = grids[level]
        inside = 0 <= i < rows and 0 <= j < columns
        return starts[level] + (i * columns + j) * stages + stage if inside else -1

    found = []
    for level, (rows, columns) in enumerate(grids):
        for i, j, stage in np.ndindex(rows, columns, stages):
            own = [(i, j - 1), (i - 1, j - 1), (i - 1, j), (i - 1, j + 1)]
            a, b = i // 2, j // 2
            beside = [(a, b), (a, b - 1), (a, b + 1), (a - 1, b), (a + 1, b)]
            above = [number(level - 1, *at, stage) if level else -1 for at in beside]
            found.append((len(found) - 1, *(number(level, *at, stage) for at in own), *above))
    return tuple(found)


class CodePrior(nn.Module):
    """Logits [batch, length, vocabulary] of codes [batch, length], each given those before it.

    What enters at a place is the sum of the embeddings of its neighbours, of the place and of the
    label, so that neither nearness nor the label has to be found by attention.
    """

    vocabulary: int
    neighbours: tuple[tuple[int, ...], ...]
    classes: int | None = None
    depth: int = 2
    width: int = 64
    heads: int = 4
    dropout: float = 0.0

    def setup(self) -> None:
        start, length = nn.initializers.normal(0.02), len(self.neighbours)
        shape = (len(self.neighbours[0]), self.vocabulary + 1, self.width)
        self.embedding = self.param("embedding", start, shape)
        self.places = self.param("places", start, (length, self.width))
        if self.classes is not None:
            self.labels = self.param("labels", start, (self.classes + 1, self.width))
        x = jnp.zeros((1, 1, self.width))
        self.blocks = stacked(self, "blocks", self.block(), self.depth, x)
        self.last_norm = Norm("layer")
        self.head = nn.Dense(self.vocabulary, kernel_init=start)

    def block(self) -> Block:
        """One block, whose parameters are stacked under "blocks"."""
        return Block(
            self.heads,
            causal=True,
            dropout=self.dropout,
            kernel_init=nn.initializers.normal(0.02),
            residual_init=nn.initializers.normal(0.02 / (2 * self.depth) ** 0.5),
            parent=None,
        )

    def __call__(self, tokens: jax.Array, label: Any = None, *, dropout_key: Any = None) -> Any:
        h = self._enter(tokens, label, jnp.arange(tokens.shape[1]))
        h = drop(h, self.dropout, dropout_key, self.depth)
        return self._leave(apply_stack(self.block(), self.blocks, h, dropout_key=dropout_key)[0])

    def empty_cache(self, batch: int) -> Any:
        """Keys and values of no place yet."""
        return empty_cache(self.block(), self.depth, batch, len(self.neighbours), self.width)

    def step(self, cache: Any, tokens: jax.Array, label: Any, position: jax.Array) -> Any:
        """(logits [batch, vocabulary] of the code at `position`, cache); later tokens are not
        read."""
        h = self._enter(tokens, label, jnp.reshape(position, (1,)))
        h, cache = apply_stack(self.block(), self.blocks, h, cache=cache, start=position)
        return self._leave(h)[:, 0], cache

    def _enter(self, tokens: jax.Array, label: Any, positions: jax.Array) -> jax.Array:
        # No neighbour is -1: the last of the padded row, a code of its own.
        padded = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=self.vocabulary)
        near = padded[:, jnp.asarray(self.neighbours)[positions]]
        h = self.places[positions][None]
        for i in range(near.shape[-1]):
            h = h + self.embedding[i][near[..., i]]
        if self.classes is None:
            return h
        none = jnp.full(len(tokens), self.classes)
        return h + self.labels[none if label is None else label][:, None]

    def _leave(self, h: jax.Array) -> jax.Array:
        return on_flat(self.head, self.last_norm(h))
