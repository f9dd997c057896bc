"""Time to compile the gradient of deep networks, by depth: Glow, TarFlow, U-Net, MLP.

A network whose layers are written out compiles in a time that grows with their number; one that
scans over them does not. `growth` is the time at the greatest depth over that at the least.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks._table import OURS, Row, show
from experiments.benchmarks._workload import launch
from genjax import networks

FLAT, IMAGE = (8, 16), (4, 8, 8, 4)
# Of each network a maker by depth, and the shapes of its arguments.
NETWORKS = {
    "mlp": (lambda depth: networks.MLP((64,) * depth), [FLAT]),
    "planar": (networks.PlanarFlow, [FLAT]),
    "realnvp": (lambda depth: networks.RealNVP(depth, (64, 64)), [FLAT]),
    "glow": (lambda depth: networks.Glow(levels=1, num_steps=depth, width=32), [IMAGE]),
    "tarflow": (lambda depth: networks.TarFlow(blocks=depth, width=32), [IMAGE]),
    "unet": (lambda depth: networks.UNet((16, 16), num_blocks=depth // 2), [IMAGE, (4,)]),
}


@dataclasses.dataclass(frozen=True)
class Config:
    depths: tuple[int, ...] = (4, 16)  # how many layers, blocks or steps
    networks: tuple[str, ...] = tuple(NETWORKS)  # which networks


def compile_ms(name: str, depth: int) -> float:
    """Milliseconds to trace and compile the gradient for the parameters."""
    make, shapes = NETWORKS[name]
    module, arguments = make(depth), [jnp.ones(shape) for shape in shapes]
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
        least = min(spent)
        for depth, ms in spent.items():
            checks = {} if depth == least else {"growth": ms / spent[least]}
            rows += show([Row("compile", f"{name} depth={depth}", OURS, ms, checks=checks)])
    return rows


if __name__ == "__main__":
    launch(main, Config)
