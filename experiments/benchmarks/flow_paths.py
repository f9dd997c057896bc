"""Time of continuous flows and of flow matching beside their peers, on CPU.

    cnf_loglik, cnf_grad            d = 2, rk4 of 20 steps, exact trace, batch 256, MLP 2 x 64 tanh
    cnf64_grad                      d = 64, dopri5 at 1e-5, one probe
      torchdiffeq, diffrax              diffrax in 2-D by its fifth-order method of 14 steps, as
                                        many evaluations
    fm, fm_ot                       MLP 3 x 64 SELU, d = 2, batch 256; 50 updates in one program
      torchcfm                          as it is, and with its exact coupling
      genjax_exact                      the exact assignment too (genjax: the entropic plan)

Timed as in experiments.benchmarks.flows; `from_torchdiffeq` is the relative difference
of what is computed.
"""

import dataclasses
import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.benchmarks._table import OURS, Row
from experiments.benchmarks._timing import Side
from experiments.benchmarks.flows import Workload, compare, torch_trainer, wait
from experiments.flow_matching import exact_assignment, sinkhorn_plan
from genjax import flows
from genjax.networks.mlp import MLP
from genjax.training import init_state, make_train_step

CNF = {"diffrax": 1.0, "torchdiffeq": 1.0}
TARGETS = {
    "cnf_loglik": CNF,
    "cnf_grad": {"diffrax": 1.0, "torchdiffeq": 1.2},
    "cnf64_grad": CNF,
    "fm": {"torchcfm": 1.9},
    "fm_ot": {"torchcfm": 3.0},
}


@dataclasses.dataclass(frozen=True)
class Config:
    rounds: int = 15
    """How often all sides are timed in turn."""
    inner: int = 5
    """Calls in one timing."""
    workloads: tuple[str, ...] = tuple(TARGETS)
    """Which to time."""


def cnf_weights(d: int, width: int = 64) -> list[np.ndarray]:
    rng = np.random.RandomState(3)
    sizes = [(d + 1, width), (width, width), (width, d)]
    pairs = [(rng.randn(i, o) / np.sqrt(i), 0.1 * rng.randn(o)) for i, o in sizes]
    return [part.astype(np.float32) for pair in pairs for part in pair]


def cnf_field(w: Any, x: Any, t: Any) -> Any:
    h = jnp.concatenate([x, t[:, None]], axis=1)
    h = jnp.tanh(h @ w[0] + w[1][None])
    return jnp.tanh(h @ w[2] + w[3][None]) @ w[4] + w[5][None]


def cnf(d: int, gradient: bool) -> Workload:
    batch, adaptive = 256, d > 2
    rng = np.random.RandomState(0)
    x = rng.randn(batch, d).astype(np.float32)
    e = (rng.randint(0, 2, (batch, d)) * 2 - 1).astype(np.float32)
    w = [jnp.asarray(part) for part in cnf_weights(d)]
    base = flows.normal((d,))

    def ours(w: Any) -> Any:
        z, log_det = flows.solve_with_log_det(
            cnf_field,
            w,
            jnp.asarray(x),
            probe=jnp.asarray(e) if adaptive else None,
            method="dopri5" if adaptive else "rk4",
        )
        return jnp.mean(base.log_prob(z) + log_det)

    def theirs(w: Any) -> Any:
        import diffrax

        def slope(t: Any, y: Any, w: Any) -> Any:
            field = lambda z: cnf_field(w, z, jnp.full((len(z),), t))  # noqa: E731
            if adaptive:
                v, pull = jax.vjp(field, y[0])
                return v, jnp.sum(pull(jnp.asarray(e))[0] * e, axis=1)
            one = lambda z: field(z[None])[0]  # noqa: E731
            return field(y[0]), jax.vmap(lambda z: jnp.trace(jax.jacfwd(one)(z)))(y[0])

        if adaptive:
            solver, step = diffrax.Dopri5(), None
            control: Any = diffrax.PIDController(rtol=1e-5, atol=1e-5)
        else:
            # diffrax has no classical rk4: its fourth-order method with as many evaluations.
            solver, step, control = diffrax.Dopri5(), 1 / 14, diffrax.ConstantStepSize()
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(slope), solver, 0.0, 1.0, step, (jnp.asarray(x), jnp.zeros(batch)),
            args=w, stepsize_controller=control, max_steps=512,
        )  # fmt: skip
        z, log_det = (leaf[-1] for leaf in solution.ys)
        return jnp.mean(base.log_prob(z) + log_det)

    def jax_side(f: Any, needs: str = "jax") -> Side:
        importlib.import_module(needs)
        return partial(wait, jax.jit(jax.grad(f) if gradient else f), w)

    def torch_side() -> Side:
        import torch
        from torchdiffeq import odeint

        tw = [torch.tensor(part, requires_grad=True) for part in cnf_weights(d)]
        tx, te = torch.from_numpy(x), torch.from_numpy(e)

        def slope(t: Any, y: Any) -> Any:
            with torch.enable_grad():
                z = y[0] if y[0].requires_grad else y[0].detach().requires_grad_(True)
                h = torch.tanh(torch.cat([z, torch.ones_like(z[:, :1]) * t], 1) @ tw[0] + tw[1])
                v = torch.tanh(h @ tw[2] + tw[3]) @ tw[4] + tw[5]
                grad = partial(
                    torch.autograd.grad, inputs=z, create_graph=gradient, retain_graph=True
                )
                if adaptive:
                    return v, (grad((v * te).sum())[0] * te).sum(1)
                return v, sum(grad(v[:, i].sum())[0][:, i] for i in range(d))

        options = {"rtol": 1e-5, "atol": 1e-5, "method": "dopri5"}
        if not adaptive:
            options = {"method": "rk4", "options": {"step_size": 1 / 20}}

        def value() -> Any:
            z, log_det = odeint(
                slope, (tx, torch.zeros(batch)), torch.tensor([0.0, 1.0]), **options
            )
            norm = -0.5 * (z[-1] ** 2).sum(1) - 0.5 * d * np.log(2 * np.pi)
            return (norm + log_det[-1]).mean()

        def run() -> Any:
            if not gradient:
                with torch.no_grad():
                    return value()
            return torch.autograd.grad(value(), tw)

        return run

    makers = {
        OURS: partial(jax_side, ours),
        "diffrax": partial(jax_side, theirs, "diffrax"),
        "torchdiffeq": torch_side,
    }

    def checks() -> dict[str, dict[str, float]]:
        own, other = (
            np.concatenate([np.ravel(np.asarray(g)) for g in jax.tree.leaves(makers[name]()())])
            for name in (OURS, "torchdiffeq")
        )
        gap = np.linalg.norm(own - other) / np.linalg.norm(other)
        return {OURS: {"from_torchdiffeq": float(gap)}}

    return Workload(makers, ("torchdiffeq",), checks)


def flow_matching(coupled: bool) -> Workload:
    batch, calls = 256, 50
    x1 = (np.random.RandomState(0).randn(batch, 2) + 2).astype(np.float32)
    network = MLP((64, 64, 64, 2), activation=jax.nn.selu)

    def side(coupling: Any) -> Side:
        def loss_fn(params: Any, key: Any, x1: Any) -> Any:
            key_pairs, key_time = jax.random.split(key)
            field = lambda x, t: network.apply(params, jnp.concatenate([x, t[:, None]], 1))  # noqa: E731
            pairs = flows.sample_pairs(key_pairs, x1, coupling=coupling)
            return flows.flow_matching_loss(field, key_time, *pairs)

        params = network.init(jax.random.key(0), jnp.zeros((1, 3)))
        optimizer = optax.adam(1e-3)
        held = [init_state(params, optimizer, jax.random.key(1))]
        step = make_train_step(loss_fn, optimizer, steps_per_call=calls)
        batches = np.broadcast_to(x1, (calls, *x1.shape))

        def run() -> None:
            held[0], metrics = step(held[0], batches)
            jax.block_until_ready(metrics)

        return run

    def torch_side() -> Side:
        import torch
        from torchcfm import conditional_flow_matching as cfm
        from torchcfm.models.models import MLP as TorchMLP

        net = TorchMLP(dim=2, w=64, time_varying=True)
        kind = "ExactOptimalTransport" if coupled else ""
        matcher = getattr(cfm, f"{kind}ConditionalFlowMatcher")(sigma=0.0)
        data = torch.from_numpy(x1)

        def loss() -> Any:
            t, x_t, u_t = matcher.sample_location_and_conditional_flow(torch.randn_like(data), data)
            return ((net(torch.cat([x_t, t[:, None]], -1)) - u_t) ** 2).mean()

        one = torch_trainer(net.parameters(), loss)

        def run() -> None:
            for _ in range(calls):
                one()

        return run

    makers: dict[str, Callable[[], Side]] = {
        OURS: partial(side, sinkhorn_plan(0.05) if coupled else None),
        "torchcfm": torch_side,
    }
    if coupled:
        makers["genjax_exact"] = partial(side, exact_assignment)
    weights = 3 * 64 + 2 * 64 * 64 + 64 * 2
    return Workload(
        makers,
        ("torchcfm",),
        work=None if coupled else {"flops": 6.0 * batch * weights},
        updates=calls,
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "cnf_loglik": partial(cnf, 2, False),
    "cnf_grad": partial(cnf, 2, True),
    "cnf64_grad": partial(cnf, 64, True),
    "fm": partial(flow_matching, False),
    "fm_ot": partial(flow_matching, True),
}


def main(config: Config) -> list[Row]:
    chosen = {name: WORKLOADS[name] for name in config.workloads}
    return compare(chosen, TARGETS, config.rounds, config.inner)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
