"""Flow matching: straight paths from noise to data, reflow, and optimal-transport couplings.

Three flows are trained one after another, each in a folder of its own inside the run's, and
compared in one summary.json:

    flow      noise and data paired as they come
    reflow    a second round on the pairs (noise, where the first flow took it)
    ot        noise and data of a batch paired by the exact assignment (sinkhorn: an entropic plan)

    python -m experiments.flow_matching
    python -m experiments.flow_matching --dataset moons --methods flow ot
    python -m experiments.flow_matching --path vp --methods flow
    python -m experiments.flow_matching --dataset digits --conditional --methods flow ot

For each: the sliced Wasserstein distance of samples to fresh data after 1 and after `sample_steps`
Euler steps, beside that between two fresh samples of the data (means over `draws` of both, which
vary much), their ratio, and the curvature of the paths.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run, _samples
from genjax import checks, flows
from genjax.data import DENSITIES, DataSpec, Scaling, load
from genjax.metrics import sliced_wasserstein
from genjax.networks import TimeMLP
from genjax.training import export_npz, init_state, make_train_step
from genjax.transport import sinkhorn_from_cost

Method = Literal["flow", "reflow", "ot", "sinkhorn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Train flows by flow matching and compare their paths."""

    dataset: str = "8gaussians"
    """A two-dimensional density, or images."""
    methods: tuple[Method, ...] = ("flow", "reflow", "ot")
    """What is trained, in this order; reflow needs flow before it."""
    path: Literal["ot", "vp"] = "ot"
    """Straight lines, or the variance-preserving path."""
    sigma_min: float = 0.0
    """Noise left at the data end of straight lines."""
    pair_size: int = 256
    """Examples that the exact assignment pairs at a time; its cost grows with the cube."""
    epsilon: float = 0.05
    """Entropy of the sinkhorn coupling, as a share of the mean cost."""
    conditional: bool = False
    """Give the labels to the network and pair within the class."""
    width: int = 128
    """Hidden units."""
    depth: int = 3
    """Residual layers."""
    dropout: float = 0.0
    """Share of hidden units dropped in training."""
    learning_rate: float = 2e-3
    """Adam's largest rate, falling along a cosine."""
    ema: float = 0.999
    """Decay of the averaged weights, which are evaluated."""
    steps: int = 8000
    """Updates of each method."""
    batch_size: int = 512
    """Examples in one update."""
    steps_per_call: int = 50
    """Updates in one call of the compiled program."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    save_every: int = 4000
    """Steps between checkpoints."""
    reflow_pairs: int = 65536
    """Pairs drawn from the first flow for the second."""
    sample_steps: int = 100
    """Euler steps of the reported samples."""
    samples: int = 5000
    """Samples on each side of a distance."""
    draws: int = 6
    """Distances, of samples and data drawn anew, that a reported distance is the mean of."""


def main(config: Config) -> dict[str, Any]:
    """Train every method, compare, draw; returns the summary."""
    if (
        "reflow" in config.methods
        and "flow" not in config.methods[: config.methods.index("reflow")]
    ):
        raise ValueError(f"methods must have flow before reflow, got {config.methods}")
    train, spec = load(config.dataset, "train", data_dir=config.data_dir)
    if config.conditional and not spec.classes:
        raise ValueError(f"conditional needs a data set with classes, got {spec.name!r}")
    keys = dict(zip(("init", "run", "data", "draw", "pairs"), jax.random.split(
        jax.random.key(config.seed), 5), strict=True))  # fmt: skip
    network = TimeMLP(
        config.width,
        config.depth,
        classes=spec.classes if config.conditional else None,
        dropout=config.dropout,
    )
    fresh = fresh_data(config, spec)
    key_a, key_b, key_noise = (jax.random.split(k, config.draws) for k in
                               jax.random.split(keys["data"], 3))  # fmt: skip
    real = [fresh(key) for key in key_a]
    noises = [jax.random.normal(key, real[0].shape) for key in key_noise]
    noise = noises[0]
    label = None
    if config.conditional:
        label = jax.random.randint(keys["draw"], (len(noise),), 0, spec.classes or 1)

    with _run.start_run(config) as run:
        summary: dict[str, Any] = {
            "dataset": config.dataset,
            "distance_fresh": mean_distance(keys["draw"], real, [fresh(key) for key in key_b]),
        }
        trained: dict[str, Any] = {}
        samples: dict[str, Any] = {}
        for method in config.methods:
            data, start = (
                train,
                jax.jit(network.init)(keys["init"], jnp.zeros((1, *spec.shape)), jnp.zeros(1)),
            )
            if method == "reflow":
                start = trained["flow"]
                data = pairs_of(config, network, start, spec, keys["pairs"])
            params = fit(config, run, network, start, spec, data, method, keys["run"])
            trained[method] = params
            export_npz(run.folder / f"{method}.npz", params)
            field = velocity(network, params, label)
            run_many = jax.jit(
                lambda x, f=field: flows.integrate(f, x, num_steps=config.sample_steps)
            )
            run_once = jax.jit(lambda x, f=field: flows.integrate(f, x, num_steps=1))
            all_many, all_once = [run_many(x) for x in noises], [run_once(x) for x in noises]
            many, once = all_many[0], all_once[0]
            far = mean_distance(keys["draw"], real, all_many)
            bend = jax.jit(lambda x, f=field: flows.curvature(f, x))(noise)
            cost = jnp.mean(jnp.sum(jnp.square(many - noise).reshape(len(noise), -1), axis=1))
            summary |= {
                f"distance_{method}": far,
                f"ratio_{method}": far / summary["distance_fresh"],
                f"distance_{method}_one_step": mean_distance(keys["draw"], real, all_once),
                f"curvature_{method}": jnp.mean(bend),
                f"transport_cost_{method}": cost,
            }
            samples |= {f"{method}, {config.sample_steps} steps": many, f"{method}, 1 step": once}
        draw(run.folder, config, spec, real[0], samples)
        summary["sampled_method"] = config.methods[-1]
        summary |= leave_samples(run, network, trained[config.methods[-1]], train, spec)
        return _run.finish(run, summary)


def fit(
    config: Config,
    whole: _run.Run,
    network: TimeMLP,
    params: Any,
    spec: DataSpec,
    data: Any,
    method: str,
    key: jax.Array,
) -> Any:
    """Train one method in its own folder; returns the averaged weights.

    The budget `max_seconds` is each method's; the whole run's steps and seconds are their sums.
    """
    folder = whole.folder / method
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps, 0.01)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    # Copied, since a train step takes the memory of the state that it is given.
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, key, ema_decays=(config.ema,))
    resume = config.resume and (folder / "config.json").exists()
    own = dataclasses.replace(config, run_dir=str(folder), resume=resume)
    with _run.start_run(own, name=method) as run:
        step_fn = make_train_step(
            make_loss(config, network, spec, method),
            optimizer,
            mesh=_run.mesh(config),
            steps_per_call=config.steps_per_call,
        )
        batches = _run.batches(config, data)
        if method == "ot":
            batches = paired(config, spec, batches)
        state = _run.fit(run, state, step_fn, batches)
        _run.finish(run, {})
    whole.training_seconds += run.training_seconds
    whole.first_call_seconds += run.first_call_seconds
    whole.steps_done = (whole.steps_done or 0) + (run.steps_done or 0)
    whole.ended_by_budget |= run.ended_by_budget
    return state.ema_params(config.ema)


def leave_samples(
    run: _run.Run, network: TimeMLP, params: Any, train: Any, spec: DataSpec
) -> dict[str, Any]:
    """Leave samples of the last method in the run's folder, the classes in turn; their cost."""
    config: Any = run.config
    count = _samples.sample_count(train, spec)
    label = jnp.arange(count) % (spec.classes or 1) if config.conditional else None

    @jax.jit
    def sample(params: Any) -> jax.Array:
        noise = jax.random.normal(jax.random.key(config.seed + 1), (count, *spec.shape))
        x = flows.integrate(velocity(network, params, label), noise, num_steps=config.sample_steps)
        return x if spec.levels is None else Scaling(spec.levels).to_levels(x)

    _, cost = _samples.save_samples(run, lambda: sample(params), evaluations=config.sample_steps)
    return {"parameters": _samples.parameter_count(params), **cost}


def make_loss(config: Config, network: TimeMLP, spec: DataSpec, method: str) -> Callable[..., Any]:
    """Pairs, then regression, as loss(params, key, batch) -> (losses, aux)."""
    path = flows.vp_path() if config.path == "vp" else flows.ot_path(config.sigma_min)
    coupling = sinkhorn_plan(config.epsilon) if method == "sinkhorn" else None

    def loss_fn(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_data, key_pairs, key_time, key_net = jax.random.split(key, 4)
        label = batch.get("label") if config.conditional else None
        field = velocity(network, params, label, key_net)
        if method in ("reflow", "ot"):  # paired before
            x0, x1 = batch["x0"], batch["x1"]
        else:
            x = prepare(spec, key_data, batch["x"])
            x0, x1 = flows.sample_pairs(key_pairs, x, coupling=coupling, label=label)
        return flows.flow_matching_loss(field, key_time, x0, x1, path=path)

    return loss_fn


def exact_assignment(cost: jax.Array) -> jax.Array:
    """For each data point (column) its noise, by the exact linear assignment, on the host.

    Within a compiled program this is a callback, which jax on one CPU core may wait for forever
    (its issue 24255): training calls it outside, see `paired`.
    """
    from scipy.optimize import linear_sum_assignment

    def solve(cost: Any) -> np.ndarray:
        return linear_sum_assignment(np.asarray(cost).T)[1].astype(np.int32)

    if checks.is_concrete(cost):
        return jnp.asarray(solve(cost))
    return jax.pure_callback(solve, jax.ShapeDtypeStruct((cost.shape[1],), jnp.int32), cost)


def paired(
    config: Config, spec: DataSpec, batches: Callable[[int], Any]
) -> Callable[[int], dict[str, np.ndarray]]:
    """Batches of data with the noise that the exact assignment gives them: x0, x1 (and label)."""
    root = jax.random.fold_in(jax.random.key(config.seed), jax.process_index())

    @jax.jit
    def noise_and_data(step: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_data, key_noise = jax.random.split(jax.random.fold_in(root, step))
        x1 = prepare(spec, key_data, x)
        return jax.random.normal(key_noise, x1.shape), x1

    def batch(step: int) -> dict[str, np.ndarray]:
        arrays = batches(step)
        kept = {"label": jnp.asarray(arrays["label"])} if config.conditional else {}
        x0, x1 = noise_and_data(step, arrays["x"])
        whole = {"x0": x0, "x1": x1, **kept}
        parts = []
        for i in range(0, len(x1), config.pair_size):
            part = {name: x[i : i + config.pair_size] for name, x in whole.items()}
            pairs = flows.sample_pairs(root, coupling=exact_assignment, **part)
            parts.append({**part, **pairs._asdict()})
        return {name: np.concatenate([part[name] for part in parts]) for name in whole}

    return batch


def sinkhorn_plan(share: float) -> Callable[[jax.Array], jax.Array]:
    """A coupling by the entropic plan at epsilon = share of the mean cost."""
    return lambda cost: sinkhorn_from_cost(cost, epsilon=share * jnp.mean(cost)).plan()


def velocity(network: TimeMLP, params: Any, label: Any = None, key: Any = None) -> Any:
    """The field v(x, t), with label and dropout key closed over."""
    return lambda x, t: network.apply(params, x, t, label=label, dropout_key=key)


def prepare(spec: DataSpec, key: jax.Array, x: jax.Array) -> jax.Array:
    """Images are dequantised to [-1, 1]; points stay as they are."""
    return x if spec.levels is None else Scaling(spec.levels).dequantise(key, x)


def pairs_of(
    config: Config, network: TimeMLP, params: Any, spec: DataSpec, key: jax.Array
) -> dict[str, np.ndarray]:
    """Pairs (noise, end of its path) of the trained flow, with labels where it takes them."""
    count = config.reflow_pairs
    x0 = jax.random.normal(key, (count, *spec.shape))
    label = jnp.arange(count) % (spec.classes or 1) if config.conditional else None

    def part(inputs: Any) -> flows.Pairs:
        x0, label = inputs
        field = velocity(network, params, label)
        return flows.reflow_pairs(field, x0, num_steps=config.sample_steps)

    split = lambda a: a.reshape(-1, min(count, 4096), *a.shape[1:])  # noqa: E731
    inputs = (split(x0), None if label is None else split(label))
    pairs = jax.jit(lambda inputs: jax.lax.map(part, inputs))(inputs)
    x0, x1 = (np.asarray(leaf).reshape(count, *spec.shape) for leaf in pairs)
    extra = {} if label is None else {"label": np.asarray(label, np.int32)}
    return {"x0": x0, "x1": x1, **extra}


def fresh_data(config: Config, spec: DataSpec) -> Callable[[jax.Array], jax.Array]:
    """Draw fresh data: of the density itself, or half of the images of the test split."""
    if spec.levels is None:
        return lambda key: DENSITIES[spec.name].sample(key, config.samples)
    test, _ = load(config.dataset, "test", data_dir=config.data_dir)

    def half(key: jax.Array) -> jax.Array:
        x = jax.random.permutation(key, jnp.asarray(test["x"]))[: len(test["x"]) // 2]
        return prepare(spec, key, x)

    return half


def mean_distance(key: jax.Array, xs: list[jax.Array], ys: list[jax.Array]) -> jax.Array:
    """Mean of the distances of pairs of samples, each with directions of its own."""
    pairs = zip(jax.random.split(key, len(xs)), xs, ys, strict=True)
    return jnp.mean(jnp.stack([distance(*pair) for pair in pairs]))


def distance(key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Sliced Wasserstein distance (p = 2) of two samples, events flattened."""
    return sliced_wasserstein(key, x.reshape(len(x), -1), y.reshape(len(y), -1))


def draw(folder: Path, config: Config, spec: DataSpec, real: Any, samples: dict[str, Any]) -> None:
    """Write samples of every method beside the data."""
    if spec.levels is None:
        _pictures.save_points(folder / "samples.png", {config.dataset: real, **samples})
        return
    for title, x in samples.items():
        name = title.replace(", ", "_").replace(" ", "_")
        levels = Scaling(spec.levels).to_levels(x[:100])
        _pictures.save_grid(folder / f"{name}.png", levels, high=spec.levels - 1, columns=10)


if __name__ == "__main__":
    _run.launch(main, Config)
