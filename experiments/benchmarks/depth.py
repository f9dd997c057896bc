"""Time to compile the gradient of deep networks, by depth: Glow, TarFlow, U-Net, MLP.

A network whose layers are written out compiles in a time that grows with their number; one that
scans over them does not. `growth` is the time at the greatest depth over that at the least.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments.benchmarks._table import OURS, Row, show
from genjax import networks


@dataclasses.dataclass(frozen=True)
class Config:
    depths: tuple[int, ...] = (4, 16)
    """How many layers, blocks or steps."""
    networks: tuple[str, ...] = ("mlp", "planar", "realnvp", "glow", "tarflow", "unet")
    """Which networks."""


def network(name: str, depth: int) -> tuple[Any, tuple[jax.Array, ...]]:
    """Make a module of that depth, and its arguments."""
    flat, image = jnp.ones((8, 16)), jnp.ones((4, 8, 8, 4))
    makers: dict[str, Callable[[], Any]] = {
        "mlp": lambda: (networks.MLP((64,) * depth), (flat,)),
        "planar": lambda: (networks.PlanarFlow(depth), (flat,)),
        "realnvp": lambda: (networks.RealNVP(depth, (64, 64)), (flat,)),
        "glow": lambda: (networks.Glow(levels=1, steps=depth, width=32), (image,)),
        "tarflow": lambda: (networks.TarFlow(blocks=depth, width=32), (image,)),
        "unet": lambda: (
            networks.UNet(channels=(16, 16), num_blocks=depth // 2),
            (image, jnp.ones(4)),
        ),
    }
    return makers[name]()


def compile_ms(name: str, depth: int) -> float:
    """Milliseconds to trace and compile the gradient for the parameters."""
    module, arguments = network(name, depth)
    params = jax.eval_shape(module.init, jax.random.key(0), *arguments)

    def loss(params: Any) -> jax.Array:
        leaves = jax.tree.leaves(module.apply(params, *arguments))
        return sum((jnp.sum(jnp.square(x)) for x in leaves), jnp.zeros(()))

    start = time.perf_counter()
    jax.jit(jax.grad(loss)).lower(params).compile()
    return 1e3 * (time.perf_counter() - start)


def main(config: Config) -> list[Row]:
    rows = []
    compile_ms("mlp", 1)  # what the first compilation of a process needs
    for name in config.networks:
        spent = {depth: compile_ms(name, depth) for depth in config.depths}
        least = spent[min(spent)]
        for depth, ms in spent.items():
            checks = {} if depth == min(spent) else {"growth": ms / least}
            rows += show([Row("compile", f"{name} depth={depth}", OURS, ms, checks=checks)])
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
