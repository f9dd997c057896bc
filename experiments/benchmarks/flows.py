"""Time of RealNVP beside flowjax, distrax, zuko and nflows, on CPU.

    realnvp_train, realnvp_sample   8 affine couplings, MLP 2 x 128 ReLU, 64 dimensions, batch 512
      flowjax, distrax, zuko, nflows    each with its own masks or permutations

The sides are timed in turn, round by round, in one process; a ratio is the median over rounds of
(peer / genjax), so above 1 genjax is faster. `from_distrax` is the relative difference of log p
from distrax's with the same weights. Continuous flows and flow matching:
experiments.benchmarks.flow_paths.
"""

import contextlib
import dataclasses
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.benchmarks._table import OURS, Row, build, make_rows, show
from experiments.benchmarks._timing import Side, in_turn
from genjax import flows
from genjax.networks.coupling import RealNVP

TARGETS = {"realnvp_train": {"flowjax": 1.6, "distrax": 1.6}, "realnvp_sample": 1.4}
D, COUPLINGS, WIDTH, BATCH = 64, 8, 128, 512


class Workload(NamedTuple):
    """Makers of the sides; which of them are torch's; figures, work and updates of one call."""

    makers: dict[str, Callable[[], Side]]
    torch: tuple[str, ...]
    checks: Callable[[], dict[str, dict[str, float]]] = dict
    work: dict[str, float] | None = None
    updates: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    rounds: int = 15
    """How often all sides are timed in turn."""
    inner: int = 5
    """Calls in one timing."""
    workloads: tuple[str, ...] = tuple(TARGETS)
    """Which to time."""


def jax_trainer(log_prob: Callable[[Any, Any], Any], params: Any, x: Any) -> Side:
    """An Adam step on -mean log p, compiled, the state donated, the loss read back."""
    optimizer = optax.adam(1e-3)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: -jnp.mean(log_prob(p, x)))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    held = [jax.tree.map(jnp.array, params), optimizer.init(params)]

    def run() -> float:
        held[0], held[1], loss = step(*held)
        return float(loss)

    return run


def realnvp_data() -> np.ndarray:
    return (np.random.RandomState(0).randn(BATCH, D) * 0.7 + 0.3).astype(np.float32)


def realnvp_ours() -> tuple[Any, Any, flows.Base]:
    module = RealNVP(COUPLINGS, (WIDTH, WIDTH), flows.affine(1.0), activation=jax.nn.relu)
    params = module.init(jax.random.key(0), jnp.zeros((1, D)))
    return module, params, flows.normal((D,))


def bijection_of(module: Any) -> flows.Bijection:
    return flows.Bijection(module.apply, lambda p, z: module.apply(p, z, inverse=True))


def torch_flow(name: str) -> Any:
    import torch

    if name == "zuko":
        import zuko

        made = zuko.flows.RealNVP(features=D, transforms=COUPLINGS, hidden_features=(WIDTH, WIDTH))
        return made, lambda x: made().log_prob(x), lambda: made().sample((BATCH,))
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.nn.nets.mlp import MLP as NMLP
    from nflows.transforms.base import CompositeTransform
    from nflows.transforms.coupling import AffineCouplingTransform

    class Net(NMLP):
        def forward(self, inputs: Any, context: Any = None) -> Any:
            return super().forward(inputs)

    def layer(i: int) -> Any:
        mask = torch.ones(D)
        mask[::2] = -1
        mask = mask if i % 2 else -mask
        return AffineCouplingTransform(mask, lambda a, b: Net([a], [b], [WIDTH, WIDTH]))

    made = Flow(CompositeTransform([layer(i) for i in range(COUPLINGS)]), StandardNormal([D]))
    return made, made.log_prob, lambda: made.sample(BATCH)


def jax_flow(name: str, x: Any) -> tuple[Any, Any, Any]:
    """(params, log_prob(params, x), sample(params, key)) of flowjax or distrax."""
    if name == "flowjax":
        import equinox as eqx
        import paramax
        from flowjax.bijections import Affine
        from flowjax.distributions import Normal
        from flowjax.flows import coupling_flow

        made = coupling_flow(
            jax.random.key(0),
            base_dist=Normal(jnp.zeros(D)),
            transformer=Affine(),
            flow_layers=COUPLINGS,
            nn_width=WIDTH,
            nn_depth=2,
        )
        params, static = eqx.partition(
            made, eqx.is_inexact_array, is_leaf=lambda x: isinstance(x, paramax.NonTrainable)
        )
        whole = lambda p: paramax.unwrap(eqx.combine(p, static))  # noqa: E731
        return params, lambda p, x: whole(p).log_prob(x), lambda p, k: whole(p).sample(k, (BATCH,))
    importlib.import_module(name)
    _, params, _ = realnvp_ours()
    score = lambda p, x: distrax_flow(p).log_prob(x)  # noqa: E731
    draw = lambda p, k: distrax_flow(p).sample(seed=k, sample_shape=(BATCH,))  # noqa: E731
    return params, score, draw


def realnvp_side(name: str, mode: str, x: np.ndarray) -> Side:
    """A step or a sampling of genjax, flowjax or distrax."""
    if name == OURS:
        module, params, base = realnvp_ours()
        bijection = bijection_of(module)
        score = partial(flows.log_prob, bijection, base)
        draw = lambda p, k: flows.sample(bijection, base, p, k, BATCH)  # noqa: E731
    else:
        params, score, draw = jax_flow(name, jnp.asarray(x))
    if mode == "train":
        return jax_trainer(score, params, jnp.asarray(x))
    return partial(wait, jax.jit(draw), params, jax.random.key(1))


def realnvp_torch_side(name: str, mode: str, x: np.ndarray) -> Side:
    import torch

    made, score, draw = torch_flow(name)
    if mode == "sample":
        return torch.no_grad()(draw)
    data = torch.from_numpy(x)
    return torch_trainer(made.parameters(), lambda: -score(data).mean())


def realnvp(mode: str) -> Workload:
    x = realnvp_data()
    makers = {name: partial(realnvp_side, name, mode, x) for name in (OURS, "flowjax", "distrax")}
    torch_makers = {name: partial(realnvp_torch_side, name, mode, x) for name in ("zuko", "nflows")}
    module, params, _ = realnvp_ours()
    dense = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    return Workload(
        makers | torch_makers,
        tuple(torch_makers),
        checks=lambda: {OURS: {"from_distrax": distrax_difference(module, params)}},
        # A product with each weight forward, and two more for its gradient.
        work={"flops": (6.0 if mode == "train" else 2.0) * BATCH * dense},
    )


def wait(f: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(f(*args))


def torch_trainer(parameters: Any, loss_of: Callable[[], Any]) -> Side:
    import torch

    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def run() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def distrax_flow(params: Any) -> Any:
    """The same flow of the same weights, of distrax's split couplings."""
    import distrax

    def conditioner(i: int, h: Any) -> Any:
        net = params["params"][f"conditioner_{i}"]
        dense = [(net[f"Dense_{j}"]["kernel"], net[f"Dense_{j}"]["bias"]) for j in range(3)]
        h = jax.nn.relu(h @ dense[0][0] + dense[0][1])
        h = h + jax.nn.relu(h @ dense[1][0] + dense[1][1])
        return h @ dense[2][0] + dense[2][1]

    layers = [
        distrax.SplitCoupling(
            split_index=D // 2,
            event_ndims=1,
            swap=bool(i % 2),
            conditioner=partial(conditioner, i),
            bijector=lambda p: distrax.ScalarAffine(
                shift=p[..., D // 2 :], log_scale=jnp.tanh(p[..., : D // 2])
            ),
        )
        for i in range(COUPLINGS)
    ]
    base = distrax.MultivariateNormalDiag(jnp.zeros(D), jnp.ones(D))
    return distrax.Transformed(base, distrax.Inverse(distrax.Chain(layers[::-1])))


def distrax_difference(module: Any, params: Any) -> float:
    """Largest relative difference of log p from distrax's, away from the identity start."""
    keys = iter(jax.random.split(jax.random.key(2), 100))
    params = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(next(keys), p.shape), params)
    x = jnp.asarray(realnvp_data())
    ours = flows.log_prob(bijection_of(module), flows.normal((D,)), params, x)
    return float(jnp.max(jnp.abs(ours / distrax_flow(params).log_prob(x) - 1)))


WORKLOADS = {name: partial(realnvp, name.split("_")[1]) for name in TARGETS}


def compare(
    workloads: Mapping[str, Callable[[], Workload]],
    targets: Mapping[str, Mapping[str, float] | float],
    rounds: int,
    inner: int,
) -> list[Row]:
    """Time the sides of each workload in turn; prints a line for each."""
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    for name, make in workloads.items():
        made = make()
        sides, notes = build(made.makers, made.torch)
        # A side that does many updates in one call is not called many times.
        calls = inner if made.updates == 1 else 1
        times = in_turn(sides, rounds=rounds, calls=calls, units=made.updates)
        checks = {}
        with contextlib.suppress(ImportError):
            checks = made.checks()
        options = {"targets": targets[name], "checks": checks, "work": made.work, "notes": notes}
        rows += show(make_rows(name, times, **options))
    return rows


def main(config: Config) -> list[Row]:
    chosen = {name: WORKLOADS[name] for name in config.workloads}
    return compare(chosen, TARGETS, config.rounds, config.inner)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
