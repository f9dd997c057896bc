"""Programs compiled for TPU pods, without one: memory of a chip, flops, collectives.

    python -m experiments.benchmarks.pods
    python -m experiments.benchmarks.pods --only transformer_800m dit_b --topologies v5e:16x16

Needs libtpu (extra "pods"), which compiles ahead of time on any machine. Every experiment's step
and sampler, with 4 examples of its data a chip, and three large models with 8, the state whole on
each chip or in shards. Memory is what XLA plans for one chip: arguments, results and temporary
arrays, what is donated once. A collective inside a loop over layers counts once. compile_seconds
passed, of which the compiler worked cpu_seconds on all cores together: on a machine that does other
work the second is what compares. Rows are kept under experiments/benchmarks/results as they come.
"""

import dataclasses
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments import _run, _system
from experiments._data import Data
from genjax import checks, flows
from genjax.data import DataSpec
from genjax.networks import DiT, TarFlow
from genjax.training import init_state, make_train_step
from genjax.training.parallel import replicated, sharded, shards_of

RESULTS = Path(__file__).with_name("results")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
# Every experiment that trains a `System` (but the one of one image, for one device) and its
# networks: the first word is the module. A last word as 64x64 asks for colour images of that size
# instead of the experiment's own data.
EXPERIMENTS: Mapping[str, Mapping[str, Any]] = {
    "vae": {},
    "vae conv": {"network": "conv"},
    "hierarchical_vae": {},
    "vqvae": {},
    "gan": {},
    "gan dcgan": {"network": "dcgan"},
    "wgan": {},
    "f_gan": {},
    "stylegan": {"network": "stylegan2"},
    "stylegan r3gan": {},
    "stylegan 64x64": {"network": "stylegan2", "width": 512},
    "sinkhorn_gan": {},
    "diffusion": {},
    "diffusion unet": {"network": "unet"},
    "diffusion dit": {"network": "dit"},
    "flow_matching": {},
    "few_step": {},
    "few_step consistency": {"method": "consistency"},
    "latent": {},
    "latent dit": {"network": "dit"},
    "bridge": {},
    "bridge fitting": {"pairs": "fitting"},
    "flow": {"model": "glow"},
    "continuous_flow": {},
    "pixelcnn": {},
    "language_model": {},
    **{f"language_model {kind}": {"network": kind} for kind in ("s4", "s4d", "mamba", "mamba2")},
    "masked_diffusion": {},
    "rlhf": {},
    "long_range": {"task": "digits"},
    "features": {},
    "mutual_information": {},
}


@dataclasses.dataclass(frozen=True)
class Config:
    topologies: tuple[str, ...] = ("v5e:4x4",)
    """Pods, as libtpu names them."""
    shardings: tuple[str, ...] = ("replicated", "fsdp")
    """Layouts of the large models."""
    only: tuple[str, ...] = ()
    """Names of EXPERIMENTS and of LARGE (default: all)."""
    results: str = str(RESULTS / "pods.json")
    """Where the rows are kept; the table lies beside it."""


class Program(NamedTuple):
    """A compiled function before it is lowered: its arguments are shapes that know their place."""

    function: Any
    arguments: tuple[Any, ...]


def placed(shapes: Any, places: Any) -> Any:
    """Shapes with where they lie."""
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(put, shapes, places)


def everywhere(tree: Any, place: Any) -> Any:
    return jax.tree.map(lambda _: place, tree)


def experiment(name: str, options: Mapping[str, Any], mesh: Mesh) -> Iterator[tuple[str, Program]]:
    """Step of an experiment, and its sampler where it has one."""
    module = importlib.import_module(f"experiments.{name.split()[0]}")
    count = 4 * mesh.devices.size
    config = module.Config(batch_size=count, steps_per_call=1, **options)
    sizes = re.search(r"(\d+)x(\d+)$", name)
    data = colour_images(count, *map(int, sizes.groups())) if sizes else module.load_data(config)
    system = module.build(config, data)
    state = jax.eval_shape(_system.initial(config, system)[2], jax.random.key(0))
    batch = system.batches(_run.batches(config, data.trained_on))(0)
    axis = 0
    if not callable(system.loss):
        critic = system.step_options.get("n_critic", 1)
        batch, axis = jax.tree.map(lambda x: np.stack([x] * critic), batch), 1
    step = _system.make_step(config, system, mesh).compiled  # type: ignore[attr-defined]
    split = placed(jax.eval_shape(lambda: batch), everywhere(batch, sharded(mesh, axis)))
    whole = placed(state, everywhere(state, replicated(mesh)))
    yield "step", Program(step, (whole, split))
    if system.sample is None:
        return
    params = jax.eval_shape(lambda s: _system.weights(config, system, s), state)
    params = placed(params, everywhere(params, replicated(mesh)))
    labels = None if system.labels is None else jnp.arange(count) % (data.spec.classes or 1)
    sample = lambda p, k: system.sample(p, k, count, labels)  # type: ignore[misc] # noqa: E731
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    yield "sampler", Program(jax.jit(sample, out_shardings=sharded(mesh)), (params, key))


def colour_images(count: int, height: int, width: int) -> Data:
    """Black images: a program depends on shapes alone."""
    black = {"x": np.zeros((count, height, width, 3), np.uint8)}
    return Data(black, black, DataSpec("black", "images", (height, width, 3), 256, None))


def tarflow(blocks: int, layers: int, width: int) -> tuple[Any, Any, tuple[int, ...]]:
    """A transformer flow of 64 x 64 images in patches of 4, and its loss."""
    net = TarFlow(4, blocks, layers, width, width // 64, remat=True)

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        z, log_det = net.apply(params, batch["x"])
        return 0.5 * jnp.sum(jnp.square(z), axis=(1, 2)) - log_det, {}

    return net, loss, (64, 64, 3)


def dit(width: int, depth: int, heads: int) -> tuple[Any, Any, tuple[int, ...]]:
    """A diffusion transformer of the latents of 256 x 256 images, by flow matching."""
    net = DiT(2, width, depth, heads, remat=True)

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        velocity = lambda x, t: net.apply(params, x, t)  # noqa: E731
        noise = jax.random.normal(key, batch["x"].shape)
        return flows.flow_matching_loss(velocity, key, noise, batch["x"])

    return net, loss, (32, 32, 4)


LARGE: Mapping[str, Callable[[], tuple[Any, Any, tuple[int, ...]]]] = {
    "transformer_228m": lambda: tarflow(8, 4, 768),
    "transformer_800m": lambda: tarflow(8, 8, 1024),
    "dit_b": lambda: dit(768, 12, 12),
}


def large(name: str, sharding: str, mesh: Mesh) -> Program:
    """The step of a large model, Adam with averages, 8 examples a chip."""
    net, loss, event = LARGE[name]()
    optimizer = optax.adamw(1e-4)
    x = jnp.zeros((1, *event))
    inputs = (x, jnp.zeros(1)) if name.startswith("dit") else (x,)

    def make(key: jax.Array) -> Any:
        return init_state(net.init(key, *inputs), optimizer, key, ema_decays=(0.999,))

    state = jax.eval_shape(make, jax.random.key(0))
    batch = {"x": jax.ShapeDtypeStruct((8 * mesh.devices.size, *event), jnp.float32)}
    step = make_train_step(loss, optimizer, mesh=mesh, sharding=sharding).compiled  # type: ignore
    fsdp = sharding == "fsdp"
    places = shards_of(mesh, state) if fsdp else everywhere(state, replicated(mesh))
    split = placed(batch, everywhere(batch, sharded(mesh)))
    return Program(step, (placed(state, places), split))


def measured(program: Program) -> dict[str, Any]:
    """Compile, and say what XLA says."""
    begun, used = time.perf_counter(), time.process_time()
    compiled = program.function.lower(*program.arguments).compile()
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    params = jax.tree.leaves(getattr(program.arguments[0], "params", program.arguments[0]))
    return {
        "parameters": sum(int(np.prod(x.shape)) for x in params),
        "arguments_mb": round(memory.argument_size_in_bytes / 1e6, 2),
        "chip_mb": round((held + memory.temp_size_in_bytes) / 1e6, 2),
        "gflops": round((cost or {}).get("flops", 0.0) / 1e9, 3),
        **collectives(compiled.as_text()),
        "compile_seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
    }


def collectives(text: str) -> dict[str, Any]:
    """How many collectives an XLA program has, and the bytes that they give a chip."""
    found: dict[str, Any] = {"collectives": {}, "collective_mb": 0.0}
    for shapes, name in re.findall(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", text):
        found["collectives"][name] = found["collectives"].get(name, 0) + 1
        for kind, size in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = int(np.prod([int(n) for n in size.split(",") if n] or [1]))
            found["collective_mb"] += count * BYTES.get(kind, 4) / 1e6
    found["collective_mb"] = round(found["collective_mb"], 2)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = ("program", "topology", "sharding", "parameters", "chip_mb", "gflops",
             "collectives", "collective_mb", "compile_seconds", "cpu_seconds")  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        told = {**row, "collectives": ", ".join(
            f"{n} {name}" for name, n in row.get("collectives", {}).items()
        )}  # fmt: skip
        if "error" in row:
            told["chip_mb"] = "does not compile: " + row["error"]
        lines.append("| " + " | ".join(str(told.get(name, "")) for name in names) + " |")
    return "\n".join(lines) + "\n"


def programs(config: Config, topology: str, mesh: Mesh) -> Iterator[tuple[str, str, Any]]:
    """(name, layout, how to make the program) of all that is asked for."""
    chosen = lambda name: not config.only or name in config.only  # noqa: E731
    for name in filter(chosen, LARGE):
        for layout in config.shardings:
            yield f"{name} step", layout, lambda n=name, s=layout: large(n, s, mesh)
    if topology == config.topologies[0]:
        for name in filter(chosen, EXPERIMENTS):
            parts = lambda n=name: dict(experiment(n, EXPERIMENTS[n], mesh))  # noqa: E731
            for part in ("step", "sampler"):
                yield f"{name} {part}", "replicated", lambda p=part, f=parts: f().get(p)


def main(config: Config) -> list[dict[str, Any]]:
    """Compile everything that is asked for; returns the rows."""
    from jax.experimental import topologies

    for name in config.only:
        checks.one_of("only", name, (*EXPERIMENTS, *LARGE))
    path, rows = Path(config.results), []
    if path.exists():
        rows = json.loads(path.read_text())
    for topology in config.topologies:
        found = topologies.get_topology_desc(topology, platform="tpu")
        mesh = Mesh(np.asarray(found.devices).reshape(-1), ("data",))
        for name, layout, make in programs(config, topology, mesh):
            row = {"program": name, "topology": topology, "sharding": layout}
            try:
                program = make()
                if program is None:  # what only trains has no sampler
                    continue
                row |= measured(program)
            except Exception as error:  # a row says so, and the others follow
                row["error"] = str(error).strip().split("\n")[0][:160]
            print(json.dumps(row), flush=True)
            same = [r for r in rows if all(r[k] == row[k] for k in list(row)[:3])]
            rows = [r for r in rows if r not in same] + [row]
            _run.write_json(path, rows)
            path.with_suffix(".md").write_text(table(rows))
    return rows


if __name__ == "__main__":
    # No chip is looked for: libtpu only compiles, in several processes if need be.
    for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _run.launch(main, Config)
