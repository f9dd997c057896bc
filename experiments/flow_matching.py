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
    python -m experiments.flow_matching --dataset mnist_5k --methods flow --preconditioned

For each: the sliced Wasserstein distance of samples to fresh data after 1 and after `sample_steps`
Euler steps, beside that between two fresh samples of the data (means over `draws` of both, which
vary much), their ratio, and the curvature of the paths.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _keys, _pictures, _run
from experiments._data import Data, load_data
from experiments._networks import NetworkConfig, network_of
from experiments._system import Measures, Row, System, parameter_count, prepare, weights
from genjax import checks, flows
from genjax.data import DENSITIES
from genjax.metrics import sliced_wasserstein
from genjax.training import export_npz
from genjax.transport import sinkhorn_from_cost

FLOW = {"methods": ("flow",)}
ROWS = (
    Row("flow_matching", "Flow matching", {**FLOW, "width": 256, "dropout": 0.1}, FLOW,
        larger={"preconditioned": True, "width": 512, "batch_size": 256}),
    Row("flow_dit", "DiT flow", {**FLOW, "network": "dit", "width": 64, "dropout": 0.1,
                                 "batch_size": 128, "steps_per_call": 10, "sample_steps": 25,
                                 "draws": 1}),
)  # fmt: skip
Method = Literal["flow", "reflow", "ot", "sinkhorn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(NetworkConfig):
    """Train flows by flow matching and compare their paths."""

    evaluation: ClassVar = ("sample_steps", "samples", "draws")

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
    preconditioned: bool = False
    """Add the network to the best linear field: for an MLP with fewer units than pixels."""
    width: int = 128
    learning_rate: float = 2e-3
    ema: float = 0.999
    steps: int = 8000
    """Updates of each method."""
    batch_size: int = 512
    steps_per_call: int = 50
    log_every: int = 100
    save_every: int = 4000
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
    before = config.methods[: config.methods.index("reflow")] if "reflow" in config.methods else ()
    if "reflow" in config.methods and "flow" not in before:
        raise ValueError(f"methods must have flow before reflow, got {config.methods}")
    if len(set(config.methods)) < len(config.methods):
        raise ValueError(f"methods must differ, got {config.methods}")
    data = load_data(config)
    compare = Comparison(config, data)
    with _run.start_run(config) as run:
        summary: dict[str, Any] = {"distance_fresh": compare.distance_fresh()}
        trained: dict[str, Any] = {}
        for method in config.methods:
            trained[method] = fit(config, run, data, method, trained.get("flow"))
            summary |= compare(method, trained[method])
        compare.plot(run.folder)
        last = config.methods[-1]
        measures = Measures(config, build(config, data), data)
        summary |= {"sampled_method": last, "parameters": parameter_count(trained[last])}
        summary |= measures.of(run, trained[last])
        return _run.finish(run, summary)


def fit(config: Config, whole: _run.Run, data: Data, method: Method, flow: Any) -> Any:
    """Train one method in its own folder; returns the averaged weights. `flow`: those of the first
    flow, where reflow begins.

    The budget `max_seconds` is each method's; the whole run's steps and seconds are their sums.
    """
    folder = whole.folder / method
    resume = config.resume and (folder / "config.json").exists()
    own = dataclasses.replace(config, run_dir=str(folder), resume=resume, methods=(method,))
    system = build(own, data)
    if method == "reflow":
        pairs = pairs_of(config, data, flow)
        data, system = data._replace(train=pairs), system._replace(init=lambda key: flow)
    training = prepare(own, system, data)
    with _run.start_run(own) as run:
        params = weights(own, system, _run.fit(run, *training))
        export_npz(run.folder / "params.npz", params)
        _run.finish(run, {"parameters": parameter_count(params)})
    whole.training_seconds += run.training_seconds
    whole.first_call_seconds += run.first_call_seconds
    whole.steps_done = (whole.steps_done or 0) + (run.steps_done or 0)
    whole.ended_by_budget |= run.ended_by_budget
    return params


def velocity_of(config: Config, data: Data) -> tuple[Any, Callable[..., Any]]:
    """The network, and (params, label=None, key=None) -> the field v(x, t) with label and dropout
    key closed over."""
    # Inputs of variance 1 bear a norm, without which a few of many paths run away at the end.
    norm = "layer" if config.preconditioned else "none"
    network, path = network_of(config, data, norm=norm), path_of(config)

    def velocity(params: Any, label: Any = None, key: Any = None) -> Any:
        field = lambda x, t: network.apply(params, x, t, label=label, dropout_key=key)  # noqa: E731
        return flows.preconditioned(field, path=path) if config.preconditioned else field

    return network, velocity


def path_of(config: Config) -> flows.Path:
    """The path that the config names."""
    return flows.vp_path() if config.path == "vp" else flows.ot_path(config.sigma_min)


def build(config: Config, data: Data) -> System:
    """The last of the config's methods: pairs, then regression on their paths."""
    method, scaling, path = config.methods[-1], data.scaling(), path_of(config)
    network, velocity = velocity_of(config, data)
    coupling = sinkhorn_plan(config.epsilon) if method == "sinkhorn" else None

    def init(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, *data.spec.shape)), jnp.zeros(1))

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_data, key_pairs, key_time, key_net = jax.random.split(key, 4)
        label = batch["label"] if config.conditional else None
        field = velocity(params, label, key_net)
        if method in ("reflow", "ot"):  # paired before
            x0, x1 = batch["x0"], batch["x1"]
        else:
            x = scaling.dequantise(key_data, batch["x"])
            x0, x1 = flows.sample_pairs(key_pairs, x, coupling=coupling, label=label)
        return flows.flow_matching_loss(field, key_time, x0, x1, path=path)

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        noise = jax.random.normal(key, (n, *data.spec.shape))
        field = velocity(params, label)
        return scaling.to_levels(flows.integrate(field, noise, num_steps=config.sample_steps))

    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps, 0.01)
    system = System(
        init,
        loss,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        sample,
        evaluations=config.sample_steps,
        labels=data.labels() if config.conditional else None,
        remat=config.network == "dit",
    )
    if method != "ot":
        return system
    return system._replace(batches=lambda batches: paired(config, scaling, batches))


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
    config: Config, scaling: Any, batches: Callable[[int], Any]
) -> Callable[[int], dict[str, np.ndarray]]:
    """Batches of data with the noise that the exact assignment gives them: x0, x1 (and label)."""
    root = jax.random.fold_in(_keys.keys(config.seed).batches, jax.process_index())

    @jax.jit
    def noise_and_data(step: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_data, key_noise = jax.random.split(jax.random.fold_in(root, step))
        x1 = scaling.dequantise(key_data, x)
        return jax.random.normal(key_noise, x1.shape), x1

    def batch(step: int) -> dict[str, np.ndarray]:
        arrays = batches(step)
        kept = {"label": jnp.asarray(arrays["label"])} if config.conditional else {}
        x0, x1 = noise_and_data(step, arrays["x"])
        whole = {"x0": x0, "x1": x1, **kept}
        parts = []
        for i in range(0, len(x1), config.pair_size):
            part = {name: x[i : i + config.pair_size] for name, x in whole.items()}
            # An assignment draws nothing from the key.
            pairs = flows.sample_pairs(root, coupling=exact_assignment, **part)
            parts.append({**part, **pairs._asdict()})
        return {name: np.concatenate([part[name] for part in parts]) for name in whole}

    return batch


def sinkhorn_plan(share: float) -> Callable[[jax.Array], jax.Array]:
    """A coupling by the entropic plan at epsilon = share of the mean cost."""
    return lambda cost: sinkhorn_from_cost(cost, epsilon=share * jnp.mean(cost)).plan()


def pairs_of(config: Config, data: Data, params: Any) -> dict[str, np.ndarray]:
    """Pairs (noise, end of its path) of the trained flow, with labels where it takes them."""
    count, (_, velocity) = config.reflow_pairs, velocity_of(config, data)
    key = jax.random.fold_in(_keys.keys(config.seed).batches, _keys.PAIRS)
    x0 = jax.random.normal(key, (count, *data.spec.shape))
    label = data.labels(count) if config.conditional else None

    def part(inputs: Any) -> flows.Pairs:
        x0, label = inputs
        field = velocity(params, label)
        return flows.reflow_pairs(field, x0, num_steps=config.sample_steps)

    # Parts of one size, the last one filled up from the front.
    parts = -(-count // 4096)
    index = np.resize(np.arange(count), (parts, -(-count // parts)))
    inputs = (x0[index], None if label is None else jnp.asarray(label)[index])
    pairs = jax.jit(lambda inputs: jax.lax.map(part, inputs))(inputs)
    x0, x1 = (np.asarray(leaf).reshape(-1, *data.spec.shape)[:count] for leaf in pairs)
    return {"x0": x0, "x1": x1, **({} if label is None else {"label": np.asarray(label)})}


class Comparison:
    """What is measured of every method: distances to fresh data, curvature, cost of transport."""

    def __init__(self, config: Config, data: Data):
        self.config, self.data, (_, self.velocity) = config, data, velocity_of(config, data)
        key, key_label, self.key_distance = jax.random.split(_keys.keys(config.seed).test, 3)
        key_a, key_b, key_noise = (
            jax.random.split(k, config.draws) for k in jax.random.split(key, 3)
        )
        self.real, self.again = ([self.fresh(k) for k in keys] for keys in (key_a, key_b))
        self.noises = [jax.random.normal(k, self.real[0].shape) for k in key_noise]
        self.label, self.samples = None, {}
        if config.conditional:
            size = (len(self.noises[0]),)
            self.label = jax.random.randint(key_label, size, 0, data.spec.classes or 1)

    def fresh(self, key: jax.Array) -> jax.Array:
        """Fresh data: of the density itself, or half of the images of the test split."""
        if self.data.kind == "points":
            return DENSITIES[self.data.spec.name].sample(key, self.config.samples)
        test, (key_half, key_noise) = jnp.asarray(self.data.test["x"]), jax.random.split(key)
        half = jax.random.permutation(key_half, test)[: len(test) // 2]
        return self.data.scaling().dequantise(key_noise, half)

    def distance(self, samples: list[jax.Array]) -> jax.Array:
        """Sliced Wasserstein distance (p = 2) to fresh data, the mean over the draws."""
        flat = [[x.reshape(len(x), -1) for x in xs] for xs in (self.real, samples)]
        keys = jax.random.split(self.key_distance, len(samples))
        return jnp.mean(jnp.stack([sliced_wasserstein(*z) for z in zip(keys, *flat, strict=True)]))

    def distance_fresh(self) -> jax.Array:
        """The distance between two fresh samples of the data."""
        return self.distance(self.again)

    def __call__(self, method: str, params: Any) -> dict[str, Any]:
        """The numbers of one method."""
        field = self.velocity(params, self.label)
        run = jax.jit(flows.integrate, static_argnums=0, static_argnames="num_steps")
        steps = self.config.sample_steps
        many, once = ([run(field, x, num_steps=n) for x in self.noises] for n in (steps, 1))
        noise, far = self.noises[0], self.distance(many)
        self.samples |= {f"{method}, {steps} steps": many[0], f"{method}, 1 step": once[0]}
        return {
            f"distance_{method}": far,
            f"ratio_{method}": far / self.distance_fresh(),
            f"distance_{method}_one_step": self.distance(once),
            f"curvature_{method}": jnp.mean(jax.jit(lambda x: flows.curvature(field, x))(noise)),
            f"transport_cost_{method}": jnp.sum(jnp.square(many[0] - noise)) / len(noise),
        }

    def plot(self, folder: Any) -> None:
        """Write samples of every method beside the data."""
        if self.data.kind == "points":
            sets = {self.config.dataset: self.real[0], **self.samples}
            title = "data, and samples by method and steps"
            _pictures.save_points(folder / "methods.png", sets, title=title)
        else:
            rows = np.concatenate([x[:10] for x in (self.real[0], *self.samples.values())])
            title = f"by row: data; {'; '.join(self.samples)}"
            _pictures.save_grid(folder / "methods.png", rows, title=title, columns=10, low=-1)


if __name__ == "__main__":
    _run.launch(main, Config)
