"""Time of one step of vector quantisation beside vector-quantize-pytorch.

vq_step: 4,096 latents of 64 numbers, 512 codes. One step finds the nearest codes, takes the
gradient, for the latents, of a loss of the straight-through values and of the commitment, and moves
the codebook by its averages.

    genjax    vector_quantise, its gradient and ema_update, jitted, the state donated
    torch_vq  VectorQuantize of vector-quantize-pytorch with averages, in training mode, eager, with
              the straight-through gradient too (its own default, a rotation, takes longer)

Both start at the same codebook; value: the loss of the last step, where the averages have settled.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks._models import repeat
from experiments.benchmarks._workload import OURS, Options, Row, Side, compare, every, launch
from genjax.variational import codebook_state, ema_update, vector_quantise

LATENTS, DIM, CODES, BETA, DECAY = 4096, 64, 512, 0.25, 0.99


@dataclasses.dataclass(frozen=True)
class Config(Options):
    steps: int = 20  # steps in one timing


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents, what the values are multiplied by in the loss, and the codebook at the start."""
    rng = np.random.default_rng(0)
    z, weights = rng.normal(size=(2, LATENTS, DIM)).astype(np.float32)
    return z, weights, z[:CODES]


def genjax_step() -> Side:
    z, weights, codebook = (jnp.asarray(x) for x in data())

    def loss(z: jax.Array, codebook: jax.Array) -> Any:
        found = vector_quantise(z, codebook)
        return jnp.sum(found.values * weights) + BETA * jnp.sum(found.commitment), found.index

    def step(state: Any, z: jax.Array) -> Any:
        (value, index), gradient = jax.value_and_grad(loss, has_aux=True)(z, state.codebook)
        return ema_update(state, z, index, decay=DECAY), value, gradient

    compiled, state = jax.jit(step, donate_argnums=0), codebook_state(codebook)

    def run() -> float:
        nonlocal state
        state, value, gradient = compiled(state, z)
        jax.block_until_ready(gradient)
        return float(value)

    return run


def torch_step() -> Side:
    import torch
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    quantiser = VectorQuantize(
        dim=DIM,
        codebook_size=CODES,
        decay=DECAY,
        commitment_weight=BETA * DIM,
        rotation_trick=False,
    )
    z, weights, codebook = (torch.from_numpy(x) for x in data())
    with torch.no_grad():
        quantiser._codebook.embed.copy_(codebook[None])
        quantiser._codebook.embed_avg.copy_(codebook[None])
        quantiser._codebook.cluster_size.fill_(1.0)
    z.requires_grad_(True)
    quantiser.train()

    def run() -> float:
        z.grad = None
        values, _, commitment = quantiser(z[None])
        loss = (values[0] * weights).sum() + LATENTS * commitment.sum()  # theirs is a mean
        loss.backward()
        return float(loss)

    return run


def step(name: str, config: Config) -> list[Row]:
    """Time both sides."""
    makers = {
        OURS: lambda: repeat(genjax_step(), config.steps),
        "torch_vq": lambda: repeat(torch_step(), config.steps),
    }
    flops = 2.0 * LATENTS * CODES * DIM
    work = {"work": lambda: {"flops": flops}, "units": config.steps, "pause": 0.05}
    values = {"checks": lambda results: {side: {"value": v} for side, v in results.items()}}
    return compare(name, makers, config, targets=1.5, **values, **work)


main = every(step, ("vq_step",))
if __name__ == "__main__":
    launch(main, Config)
