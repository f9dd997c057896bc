"""A model as pure functions, and the one way in which every experiment trains and measures it.

    data -> System -> train: fit, samples, scores, pictures, summary.json

An experiment's file holds its options, its networks, its loss and its sampler: a `Config` and
`build(config, data) -> System`. By these, and by the `load_data(config)` that it imports or has of
its own, `reopen` makes the system of a run folder again. What is
the same for all is here, once: keys, state, compiled step, averages, samples and their cost.
"""

import dataclasses
import functools
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _judge, _pictures, _run
from experiments._command import config_of
from experiments._data import Data
from experiments._keys import CARRY, keys
from genjax.data import Scaling
from genjax.networks import computing_in
from genjax.training import (
    CheckpointError,
    Checkpoints,
    critic_batches,
    data_mesh,
    export_npz,
    init_saddle_state,
    init_sharded,
    init_state,
    load_npz,
    make_saddle_step,
    make_train_step,
)
from genjax.training.parallel import check_batch, sharded


class System(NamedTuple):
    """What is trained. Parameters are any pytree.

    Two players: `init` gives {"critic": ..., "generator": ...}, `loss` and `optimizer` are pairs in
    that order as in `saddle_step`, and the generator is what is sampled.
    """

    init: Callable[[Any], Any]  # key -> params
    loss: Any  # as in `train_step`
    optimizer: Any
    sample: Callable[..., Any] | None = None
    """(params, key, n, label) -> x [n, *event]: levels of images, points, tokens."""
    log_prob: Callable[..., Any] | None = None
    """(params, key, y) -> [batch], nats, or a lower bound on them."""
    scaling: Scaling | None = None
    """What log_prob's y is made of levels by (None: y is the data itself, as floats)."""
    likelihood: Mapping[str, Any] = {}
    """Options of `test_log_likelihood`, and num_examples: how many of the test split at most."""
    evaluations: int | None = 1
    """Passes through the network, one after another, for one sample (None: not known)."""
    count: int | None = None
    """Samples that a run leaves (default: `Data.count`)."""
    labels: Any = None
    """The label of each of these samples, where the model takes labels."""
    best: str | None = None
    """The score whose smallest value chooses the checkpoint to report (default: the last one)."""
    init_carry: Callable[[Any, Any], Any] | None = None
    """(key, params) -> what no gradient moves, at the start; the key is not that of `init`."""
    absorb: Any = None
    """(carry, params, seen) -> carry after each update; of two players a pair, None where one has
    none."""
    merge_carry: Callable[[Any, Any], Any] | None = None
    """(params, carry) -> params, where sampling needs what is carried."""
    batches: Callable[[Any], Any] = lambda batches: batches
    """(step -> batch of the train split) -> (step -> what the loss takes)."""
    step_options: Mapping[str, Any] = {}
    """Further options of `make_train_step` or `make_saddle_step`."""
    remat: bool = False
    """Whether the networks follow `config.remat`, as transformers and U-Nets do."""


class Training(NamedTuple):
    """What `_run.fit` takes: the state at step 0, the compiled step, and the batch of each step."""

    state: Any
    step_fn: Callable[..., Any]
    batches: Callable[[int], Any]


class Row(NamedTuple):
    """A row of the leaderboard, a constant in its experiment's file: the options of the command
    line on images and in the plane (None: not supported). trained: has --steps and --max-seconds.
    larger: what changes above 16 pixels a side (None: such images take a call by name)."""

    name: str
    title: str
    images: Mapping[str, Any] | None = None
    plane: Mapping[str, Any] | None = None
    trained: bool = True
    bits: Literal["exact", "bound", "estimate"] = "bound"
    """What bits/dim are, of images: a bound where levels are dequantised or latents integrated."""
    module: str = ""
    larger: Mapping[str, Any] | None = None

    def of_bits(self, kind: str) -> str:
        """What bits/dim are: in the plane nothing is dequantised, and a flow's are exact."""
        return "exact" if kind == "points" and self.bits == "bound" else self.bits


def train(
    config: Any,
    system: System,
    data: Data,
    report: Callable[[_run.Run, Any, np.ndarray], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train, sample the averaged weights, judge, draw; returns the summary.

    report(run, params, samples): what only this model has to tell, and its own pictures.
    """
    _require(system, "init", "loss", "optimizer", "sample")
    training, measures = prepare(config, system, data), Measures(config, system, data)

    def evaluate(state: Any) -> dict[str, Any]:
        params = weights(config, system, state)
        if data.held_out is not None:
            return measures.validate(params)
        return measures.scores(params)

    with _run.start_run(config) as run:
        state = _run.fit(run, *training, evaluate=evaluate, best=system.best)
        facts: dict[str, Any] = {"parameters": parameter_count(state.params)}
        if system.best is not None:
            state = _run.best_state(run, state)
            facts["best_step"] = int(state.step)
        params = weights(config, system, state)
        export_npz(run.folder / "params.npz", params)
        facts |= measures.without_averaging(weights(config, system, state, averaged=False))
        return _run.finish(run, facts | measures.of(run, params, report))


def start(config: Any, system: System) -> Any:
    """The state at step 0, in the layout of `config.sharding`."""
    key_init = keys(config.seed).init
    make, init_carry, whole = initial(config, system)
    if getattr(config, "sharding", "replicated") == "fsdp":
        return init_sharded(data_mesh(config.devices), whole, key_init)
    params = jax.jit(system.init)(key_init)
    return make(params, jax.jit(init_carry)(params))


def initial(config: Any, system: System) -> tuple[Callable[..., Any], ...]:
    """(params, carry) -> state, params -> carry, and both in one: key -> state."""
    found = keys(config.seed)
    key_carry = jax.random.fold_in(found.batches, CARRY)

    def make(params: Any, carry: Any) -> Any:
        options = {"ema_decays": (config.ema,), "carry": carry}
        if callable(system.loss):
            return init_state(params, system.optimizer, found.run, **options)
        players = params["critic"], params["generator"]
        return init_saddle_state(*players, *system.optimizer, found.run, **options)

    def init_carry(params: Any) -> Any:
        return None if system.init_carry is None else system.init_carry(key_carry, params)

    def whole(key: Any) -> Any:
        params = system.init(key)
        return make(params, init_carry(params))

    return make, init_carry, whole


def prepare(config: Any, system: System, data: Data) -> Training:
    """State, step and batches. A batch that does not fit the devices is refused here, before any
    file is written."""
    mesh, batches = data_mesh(config.devices), system.batches(_run.batches(config, data.trained_on))
    check_batch(batches(0), mesh.devices.size // jax.process_count(), 0, config.accumulate)
    if config.remat and not system.remat:
        raise ValueError("remat is for transformers and U-Nets, which this network is not")
    step_fn = make_step(config, system, mesh)
    if not callable(system.loss):
        batches = critic_batches(batches, system.step_options.get("n_critic", 1))
    return Training(start(config, system), step_fn, batches)


def make_step(config: Any, system: System, mesh: Any) -> Callable[..., Any]:
    """The compiled step of a system on a mesh."""
    options = {**system.step_options, "mesh": mesh, "steps_per_call": config.steps_per_call}
    options |= {"accumulate": config.accumulate, "sharding": config.sharding}
    system = in_half_precision(system) if config.compute_dtype == "bfloat16" else system
    options |= {"compute_dtype": jnp.bfloat16} if config.compute_dtype == "bfloat16" else {}
    if system.absorb is not None:
        _require(system, "init_carry")
    if callable(system.loss):
        options["absorb"] = system.absorb
        return make_train_step(system.loss, system.optimizer, **options)
    options["critic_absorb"], options["generator_absorb"] = system.absorb or (None, None)
    return make_saddle_step(*system.loss, *system.optimizer, **options)


def in_half_precision(system: System) -> System:
    """The system with losses whose networks multiply in bfloat16."""

    def half(loss: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*given: Any) -> Any:
            with computing_in(jnp.bfloat16):
                return loss(*given)

        return computed

    one = callable(system.loss)
    return system._replace(loss=half(system.loss) if one else tuple(map(half, system.loss)))


def weights(config: Any, system: System, state: Any, *, averaged: bool = True) -> Any:
    """The parameters that are sampled: averaged, or as the last step left them; of two players the
    generator's."""
    params = state.ema_params(config.ema) if averaged else state.params
    if not averaged and not callable(system.loss):
        params = params["generator"]
    return params if system.merge_carry is None else system.merge_carry(params, state.carry)


class Measures:
    """Samples and scores of a system's weights, compiled once for a whole run."""

    def __init__(self, config: Any, system: System, data: Data):
        count = data.count if system.count is None else system.count
        labels, key = system.labels, keys(config.seed)
        self.config, self.system, self.data, self.key_test = config, system, data, key.test
        self.sample = self._on_all_devices(
            lambda params: system.sample(params, key.sample, count, labels), count
        )
        self.likelihood = _judge.likelihood(system, data)
        self.held_out = _judge.likelihood(system, data, num_draws=1)

    def _on_all_devices(self, sample: Callable[[Any], Any], count: int) -> Callable[[Any], Any]:
        """Compile a sampler so that each device makes its part of the samples."""
        mesh = data_mesh(getattr(self.config, "devices", None))
        # With several processes each must see all samples.
        if jax.process_count() > 1 or count % mesh.devices.size or mesh.devices.size == 1:
            return jax.jit(sample)
        return jax.jit(sample, out_shardings=sharded(mesh))

    @functools.cached_property
    def reference(self) -> Any:
        return _judge.reference(self.data)

    def validate(self, params: Any) -> dict[str, Any]:
        """What the density loses on the part that was held out, in nats: to be made small."""
        found = self.held_out(params, self.key_test, self.data.held_out)
        return {"nats": -found["test_log_likelihood"]}

    def without_averaging(self, params: Any) -> dict[str, Any]:
        """The density's scores of the weights as they were left, under names that say so."""
        found = self.likelihood(params, self.key_test, self.data.test)
        told = ("test_log_likelihood", "bits_per_dim")
        return {f"{name}_without_averaging": found[name] for name in told if name in found}

    def scores(self, params: Any, samples: Any = None) -> dict[str, Any]:
        """All scores of the weights."""
        samples = np.asarray(self.sample(params) if samples is None else samples)
        tokens = self.data.kind == "tokens"
        judged = {} if tokens else _judge.judge(self.reference, samples, self.system.labels)
        return {**self.likelihood(params, self.key_test, self.data.test), **judged}

    def of(self, run: _run.Run, params: Any, report: Any = None) -> dict[str, Any]:
        """Leave samples and pictures of the weights in the run's folder; returns the summary."""
        samples, cost = save_samples(
            run, lambda: self.sample(params), evaluations=self.system.evaluations
        )
        _pictures.save_samples(run.folder / "samples.png", self.data, samples, self.system.labels)
        own = report(run, params, samples) if report else {}
        return {**cost, **self.scores(params, samples), **own}


def adamw(config: Any, rate: Any, *, only_matrices: bool = True) -> Any:
    """AdamW of the config's `weight_decay` and `clip`, the largest norm of the gradient."""
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    mask = matrices if only_matrices else None
    adam = optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(config.clip), adam)


def save_samples(
    run: _run.Run, sample: Callable[[], Any], *, evaluations: int | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Write samples.npy; returns the samples and what they cost, without compilation.

    `sample()` is called twice, and timed the second time. evaluations: as in `System`.
    """
    jax.block_until_ready(sample())
    begun = time.monotonic()
    samples = np.asarray(sample())
    seconds = round(time.monotonic() - begun, 4)
    if jax.process_index() == 0:
        np.save(run.folder / "samples.npy", samples)
    cost = {"sampling_evaluations": evaluations, "sampling_seconds": seconds}
    return samples, {"samples": len(samples), **cost}


def parameter_count(params: Any) -> int:
    """Numbers in a tree of parameters."""
    return sum(np.size(x) for x in jax.tree.leaves(params))


def reopen(folder: str | Path, *, averaged: bool = True, **changes: Any) -> tuple[System, Any, Any]:
    """Open a finished or unfinished run of any experiment: (system, params, config).

    params: of the checkpoint that was best where the run has such a choice, else of the newest one;
    where there are no checkpoints, params.npz. averaged=False: as the step left them. changes:
    fields of the Config, such as those of sampling. Raises RunError naming what the folder lacks.
    """
    folder = Path(folder).absolute()
    module, config = _stored_config(folder, changes)
    data = module.load_data(config)
    system = module.build(config, data)
    state = start(config, system)
    checkpoints = Checkpoints(folder / "checkpoints", best=system.best)
    try:
        found = None if system.best is None else checkpoints.restore_best(state)
        found = found or checkpoints.restore(state)
        if found is not None:
            return system, weights(config, system, found[1], averaged=averaged), config
        if not averaged:
            raise _run.RunError(f"{folder} holds no checkpoint: no weights without averaging")
        like = weights(config, system, state, averaged=False)
        return system, load_npz(folder / "params.npz", like), config
    except FileNotFoundError:
        raise _run.RunError(f"{folder} holds neither a checkpoint nor params.npz") from None
    except (CheckpointError, ValueError) as error:
        raise _run.RunError(f"{folder} cannot be reopened: {error}") from error
    finally:
        checkpoints.close()


def sample_from(
    config: Any, folder: str, options: tuple[str, ...], report: Callable[..., Any]
) -> dict[str, Any]:
    """Sample and judge an earlier run's weights again, in a run of its own that trains nothing.

    options: the fields that are this command's, those of sampling; the others are that run's.
    report(config, data, run, params, samples): as in `train`, for that run's config and data.
    """
    changes = {name: getattr(config, name) for name in ("data_dir", "run_dir", "seed", *options)}
    system, params, again = reopen(folder, **changes)
    again = dataclasses.replace(again, sample_from=folder)
    data = sys.modules[type(config).__module__].load_data(again)
    measures = Measures(again, system, data)
    with _run.start_run(again) as run:
        export_npz(run.folder / "params.npz", params)
        facts = {"parameters": parameter_count(params)}
        own = functools.partial(report, again, data)
        return _run.finish(run, facts | measures.of(run, params, own))


def _stored_config(folder: Path, changes: Mapping[str, Any]) -> tuple[Any, Any]:
    """The experiment's module and the Config of a run folder."""
    stored = _run.read_config(folder / "config.json", "give a run's folder")
    name = stored.pop("experiment", None)
    if name is None:
        raise _run.RunError(f"{folder / 'config.json'} has no 'experiment': an older layout")
    # Nothing is imported because a file says so, but what is ours or loaded already.
    if name not in sys.modules and not str(name).startswith("experiments."):
        raise _run.RunError(f"{folder} is of {name!r}: import that module before")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise _run.RunError(f"{folder} is of {name!r}, which is no experiment: {error}") from error
    for part in ("Config", "load_data", "build"):
        if not hasattr(module, part):
            raise _run.RunError(f"{folder} cannot be reopened: {name} has no {part}")
    fields = {field.name for field in dataclasses.fields(module.Config)}
    unknown = sorted(stored.keys() - fields)
    if unknown:
        what = f"has the unknown {unknown[0]!r}"
        raise _run.RunError(f"{folder / 'config.json'} {what}: an older layout")
    config, lacking = config_of(stored, module.Config), sorted(changes.keys() - fields)
    if lacking:
        raise _run.RunError(f"{folder} is of {name}, which has no {lacking[0]!r}")
    return module, dataclasses.replace(config, **{"run_dir": str(folder), **changes})


def _require(system: System, *names: str) -> None:
    """Raise ValueError naming the parts that the system lacks."""
    lacking = [name for name in names if getattr(system, name) is None]
    if lacking:
        raise ValueError(f"system lacks {', '.join(lacking)}, which training needs")
    if callable(system.loss) != hasattr(system.optimizer, "update"):
        raise ValueError("system must have one loss and one optimizer, or a pair of each")
