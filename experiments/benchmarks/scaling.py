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
import subprocess
import sys

from experiments.benchmarks._table import OURS, Row, show
from experiments.benchmarks._workload import launch

PER_DEVICE = 128
BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s64": 8, "pred": 1}
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


@dataclasses.dataclass(frozen=True)
class Config:
    devices: tuple[int, ...] = (1, 2, 4, 8)  # numbers of emulated devices in one process
    processes: tuple[int, ...] = (2,)  # numbers of local processes with one device each
    steps: int = 20  # timed steps


def collectives(program: str) -> dict[str, int]:
    """Bytes that each kind of collective of a compiled program (HLO text) yields on a device."""
    found: dict[str, int] = {}
    # "%name = f32[3,4]{1,0} all-reduce(...)", or a tuple of shapes; "-start" where asynchronous.
    for shapes, kind in re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", program):
        for dtype, axes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = BYTES.get(dtype, 4) * math.prod(int(n) for n in axes.split(",") if n)
            found[kind] = found.get(kind, 0) + size
    return found


def measure(steps: int) -> dict[str, float]:
    """Compile and time the VAE's step on the devices of this process and of those it joined."""
    import jax

    from experiments.benchmarks._models import PIXELS, Trainer, vae
    from experiments.benchmarks._timing import in_turn
    from genjax.training import data_mesh, initialize_distributed, shard_batch

    if "JAX_NUM_PROCESSES" in os.environ:
        initialize_distributed()
    mesh, (params, loss_fn) = data_mesh(), vae()
    local = PER_DEVICE * mesh.devices.size // jax.process_count()
    x = jax.random.bernoulli(jax.random.key(0), 0.3, (local, PIXELS)) * 1.0
    trainer = Trainer(loss_fn, params, shard_batch(mesh, jax.device_get(x)), mesh=mesh)
    # Emulated devices abort where a step begins before the last one has ended on all of them.
    side = lambda: jax.block_until_ready((trainer(), trainer.state))  # noqa: E731
    times = in_turn({OURS: side}, rounds=steps, pause=0)[OURS]
    moved = collectives(
        trainer.step.compiled.lower(trainer.state, trainer.batch).compile().as_text()
    )
    found = {"ms": times.median, "devices": mesh.devices.size}
    found |= {"reduced_bytes": moved.pop("all-reduce", 0), "other_bytes": sum(moved.values())}
    return found | {"parameter_bytes": sum(4 * leaf.size for leaf in jax.tree.leaves(params))}


def run(processes: int, devices: int, steps: int) -> dict[str, float]:
    """Measure in new processes: the number of devices is fixed when jax starts."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", __spec__.name, "--steps", str(steps), "--devices", "0"]
    running = []
    for index in range(processes):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        if processes > 1:
            environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
            environment |= {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}
        options = {"env": environment, "stdout": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, **options))
    texts = [process.communicate(timeout=300)[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"{processes} processes x {devices} devices failed: see above")
    return json.loads(texts[0].splitlines()[-1])


def main(config: Config) -> list[Row]:
    if config.devices == (0,):  # one of the processes that `run` starts
        print(json.dumps(measure(config.steps)))
        return []
    rows = []
    for processes, devices in [(1, n) for n in config.devices] + [(n, 1) for n in config.processes]:
        found = run(processes, devices, config.steps)
        case = f"{processes} x {devices} devices" if processes > 1 else f"{devices} devices"
        rows += show([Row("weak_scaling", case, OURS, found.pop("ms"), checks=found)])
    return rows


if __name__ == "__main__":
    launch(main, Config)
