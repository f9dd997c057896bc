"""Weak scaling of the train step: 128 examples a device, on emulated devices and on processes.

What has to travel is read from the compiled program, not from the clock: emulated devices share
the same cores, so their times say nothing of scaling. Data parallelism needs one all-reduce of the
gradients and the metrics: `reduced_bytes` beside `parameter_bytes`, whatever the number of devices.
"""

import dataclasses
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import tyro

from experiments.benchmarks._table import OURS, Row, show

PER_DEVICE = 128
BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s64": 8, "pred": 1}
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


@dataclasses.dataclass(frozen=True)
class Config:
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of emulated devices in one process."""
    processes: tuple[int, ...] = (2,)
    """Numbers of local processes with one device each."""
    steps: int = 20
    """Timed steps."""


def collectives(program: str) -> dict[str, int]:
    """Bytes that each kind of collective of a compiled program (HLO text) yields on a device."""
    found: dict[str, int] = {}
    # "%name = f32[3,4]{1,0} all-reduce(...)", or a tuple of shapes; "-start" where asynchronous.
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
        if match:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(
                BYTES.get(kind, 4) * math.prod(int(n) for n in axes.split(",") if n)
                for kind, axes in shapes
            )
            found[match[2]] = found.get(match[2], 0) + size
    return found


def measure(steps: int) -> dict[str, float]:
    """Compile and time the VAE's step on the devices of this process and of those it joined."""
    import jax
    import jax.numpy as jnp
    import optax

    from genjax.networks import MLP
    from genjax.training import data_mesh, init_state, make_train_step, shard_batch
    from genjax.variational import bernoulli_log_likelihood, elbo

    encoder, decoder = MLP((400, 40), activation=jax.nn.relu), MLP((400, 784))

    def loss_fn(params: Any, key: Any, x: jax.Array) -> Any:
        return elbo(
            lambda x: tuple(jnp.split(encoder.apply(params[0], x), 2, axis=1)),
            lambda x, z: bernoulli_log_likelihood(x, decoder.apply(params[1], z)),
            key,
            x,
        )

    key, mesh = jax.random.key(0), data_mesh()
    params = (encoder.init(key, jnp.ones((1, 784))), decoder.init(key, jnp.ones((1, 20))))
    optimizer = optax.adam(1e-3)
    step = make_train_step(loss_fn, optimizer)
    state = init_state(params, optimizer, key)
    local = PER_DEVICE * mesh.devices.size // jax.process_count()
    batch = shard_batch(mesh, jax.device_get(jax.random.bernoulli(key, 0.3, (local, 784)) * 1.0))
    state, _ = step(state, batch)  # from here on the state is on all devices
    program = step.compiled.lower(state, batch).compile().as_text()  # type: ignore[attr-defined]
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        times.append(1e3 * (time.perf_counter() - start))
    moved = collectives(program)
    return {
        "ms": statistics.median(times),
        "devices": mesh.devices.size,
        "reduced_bytes": moved.pop("all-reduce", 0),
        "other_bytes": sum(moved.values()),
        "parameter_bytes": sum(4 * leaf.size for leaf in jax.tree.leaves(params)),
    }


def run(processes: int, devices: int, steps: int) -> dict[str, float]:
    """Measure in processes of their own: the number of devices is fixed when jax starts."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running = []
    for index in range(processes):
        flags = f"--xla_force_host_platform_device_count={devices}"
        several = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", __spec__.name, "--steps", str(steps), "--devices", "0"],
                env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
                | (several if processes > 1 else {}),
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    texts = [process.communicate(timeout=300)[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"{processes} processes x {devices} devices failed: see above")
    return json.loads(texts[0].splitlines()[-1])


def main(config: Config) -> list[Row]:
    if config.devices == (0,):  # one of the processes that `run` starts
        if "JAX_NUM_PROCESSES" in os.environ:
            from genjax.training import initialize_distributed

            initialize_distributed()
        print(json.dumps(measure(config.steps)))
        return []
    cases = [(1, n) for n in config.devices] + [(n, 1) for n in config.processes]
    rows = []
    for processes, devices in cases:
        found = run(processes, devices, config.steps)
        case = f"{processes} x {devices} devices" if processes > 1 else f"{devices} devices"
        rows += show([Row("weak_scaling", case, OURS, found.pop("ms"), checks=found)])
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
