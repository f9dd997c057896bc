"""Time of continuous flows and of flow matching beside their peers, on CPU.

    cnf_loglik, cnf_grad            d = 2, rk4 of 20 steps, exact trace, batch 256, MLP 2 x 64 tanh
    cnf64_grad                      d = 64, dopri5 at 1e-5, one probe
      torchdiffeq, diffrax              diffrax in 2-D by its fifth-order method of 14 steps, as
                                        many evaluations
    fm, fm_ot                       MLP 3 x 64 SELU, d = 2, batch 256; 50 updates in one program
      torchcfm                          as it is, and with its exact coupling
      genjax_exact                      the exact assignment too (genjax: the entropic plan)

`from_torchdiffeq` is the relative difference of what is computed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks._models import Trainer, repeat, torch_trainer, waiting
from experiments.benchmarks._workload import OURS, Options, Side, compare, every, launch
from experiments.flow_matching import exact_assignment, sinkhorn_plan
from genjax import flows
from genjax.networks import MLP

Config = Options
TARGETS = {
    "cnf_loglik": {"diffrax": 1.0, "torchdiffeq": 1.0},
    "cnf_grad": {"diffrax": 1.0, "torchdiffeq": 1.2},
    "cnf64_grad": {"diffrax": 1.0, "torchdiffeq": 1.0},
    "fm": {"torchcfm": 1.9},
    "fm_ot": {"torchcfm": 3.0},
}
BATCH, UPDATES = 256, 50
X1 = (np.random.RandomState(0).randn(BATCH, 2) + 2).astype(np.float32)


class Problem(NamedTuple):
    """A continuous flow: its points, the weights of its field, and what is asked of it."""

    x: np.ndarray
    probe: np.ndarray  # Rademacher, for the estimated trace, where steps are adaptive too
    weights: list[np.ndarray]
    gradient: bool  # the gradient for the weights, or the mean log-likelihood alone
    adaptive: bool  # steps by the estimated error, or a fixed number of them


def problem(d: int, gradient: bool, width: int = 64) -> Problem:
    rng = np.random.RandomState(0)
    x = rng.randn(BATCH, d).astype(np.float32)
    probe = (rng.randint(0, 2, (BATCH, d)) * 2 - 1).astype(np.float32)
    rng = np.random.RandomState(3)
    sizes = [(d + 1, width), (width, width), (width, d)]
    pairs = [(rng.randn(i, o) / np.sqrt(i), 0.1 * rng.randn(o)) for i, o in sizes]
    weights = [part.astype(np.float32) for pair in pairs for part in pair]
    return Problem(x, probe, weights, gradient, adaptive=d > 2)


def field(w: Any, x: Any, t: Any) -> Any:
    h = jnp.concatenate([x, t[:, None]], axis=1)
    h = jnp.tanh(h @ w[0] + w[1][None])
    return jnp.tanh(h @ w[2] + w[3][None]) @ w[4] + w[5][None]


def jax_side(given: Problem, solve: Any) -> Side:
    """solve(w) -> (z, log_det) of the points."""
    base = flows.normal(given.x.shape[1:])

    def value(w: Any) -> Any:
        z, log_det = solve(w)
        return jnp.mean(base.log_prob(z) + log_det)

    w = [jnp.asarray(part) for part in given.weights]
    return waiting(jax.jit(jax.grad(value) if given.gradient else value), w)


def ours(given: Problem) -> Side:
    options: dict[str, Any] = {"method": "rk4"}
    if given.adaptive:
        options = {"method": "dopri5", "probe": jnp.asarray(given.probe)}
    x = jnp.asarray(given.x)
    return jax_side(given, lambda w: flows.solve_with_log_det(field, w, x, **options))


def with_diffrax(given: Problem) -> Side:
    import diffrax

    def slope(t: Any, y: Any, w: Any) -> Any:
        at_t = lambda z: field(w, z, jnp.full((len(z),), t))  # noqa: E731
        if given.adaptive:
            v, pull = jax.vjp(at_t, y[0])
            return v, jnp.sum(pull(jnp.asarray(given.probe))[0] * given.probe, axis=1)
        one = lambda z: at_t(z[None])[0]  # noqa: E731
        return at_t(y[0]), jax.vmap(lambda z: jnp.trace(jax.jacfwd(one)(z)))(y[0])

    # diffrax has no classical rk4: its fourth-order method with as many evaluations.
    step: float | None = 1 / 14
    control: Any = diffrax.ConstantStepSize()
    if given.adaptive:
        step, control = None, diffrax.PIDController(rtol=1e-5, atol=1e-5)

    def solve(w: Any) -> Any:
        start = (jnp.asarray(given.x), jnp.zeros(BATCH))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(slope), diffrax.Dopri5(), 0.0, 1.0, step, start,
            args=w, stepsize_controller=control, max_steps=512,
        )  # fmt: skip
        return [leaf[-1] for leaf in solution.ys]

    return jax_side(given, solve)


def with_torchdiffeq(given: Problem) -> Side:
    import torch
    from torchdiffeq import odeint

    w = [torch.tensor(part, requires_grad=True) for part in given.weights]
    x, probe = torch.from_numpy(given.x), torch.from_numpy(given.probe)
    d = x.shape[1]

    def slope(t: Any, y: Any) -> Any:
        with torch.enable_grad():
            z = y[0] if y[0].requires_grad else y[0].detach().requires_grad_(True)
            h = torch.tanh(torch.cat([z, torch.ones_like(z[:, :1]) * t], 1) @ w[0] + w[1])
            v = torch.tanh(h @ w[2] + w[3]) @ w[4] + w[5]
            options = {"inputs": z, "create_graph": given.gradient, "retain_graph": True}
            grad = partial(torch.autograd.grad, **options)
            if given.adaptive:
                return v, (grad((v * probe).sum())[0] * probe).sum(1)
            return v, sum(grad(v[:, i].sum())[0][:, i] for i in range(d))

    solver: dict[str, Any] = {"method": "rk4", "options": {"step_size": 1 / 20}}
    if given.adaptive:
        solver = {"rtol": 1e-5, "atol": 1e-5, "method": "dopri5"}

    def value() -> Any:
        z, log_det = odeint(slope, (x, torch.zeros(BATCH)), torch.tensor([0.0, 1.0]), **solver)
        norm = -0.5 * (z[-1] ** 2).sum(1) - 0.5 * d * np.log(2 * np.pi)
        return (norm + log_det[-1]).mean()

    return (lambda: torch.autograd.grad(value(), w)) if given.gradient else torch.no_grad()(value)


def from_torchdiffeq(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    if "torchdiffeq" not in results:
        return {}
    own, other = (
        np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(results[name])])
        for name in (OURS, "torchdiffeq")
    )
    gap = np.linalg.norm(own - other) / np.linalg.norm(other)
    return {OURS: {"from_torchdiffeq": float(gap)}}


def matching(coupling: Any) -> Side:
    """Flow matching by genjax, with a coupling of the batch or None."""
    network = MLP((64, 64, 64, 2), activation=jax.nn.selu)

    def loss_fn(params: Any, key: Any, x1: Any) -> Any:
        key_pairs, key_time = jax.random.split(key)
        field = lambda x, t: network.apply(params, jnp.concatenate([x, t[:, None]], 1))  # noqa: E731
        pairs = flows.sample_pairs(key_pairs, x1, coupling=coupling)
        return flows.flow_matching_loss(field, key_time, *pairs)

    params = network.init(jax.random.key(0), jnp.zeros((1, 3)))
    return Trainer(loss_fn, params, X1, updates=UPDATES)


def with_torchcfm(coupled: bool) -> Side:
    import torch
    from torchcfm import conditional_flow_matching as cfm
    from torchcfm.models.models import MLP as TorchMLP

    net = TorchMLP(dim=2, w=64, time_varying=True)
    kind = "ExactOptimalTransport" if coupled else ""
    matcher = getattr(cfm, f"{kind}ConditionalFlowMatcher")(sigma=0.0)
    x1 = torch.from_numpy(X1)

    def loss() -> Any:
        t, x_t, u_t = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        return ((net(torch.cat([x_t, t[:, None]], -1)) - u_t) ** 2).mean()

    return repeat(torch_trainer(net.parameters(), loss), UPDATES)


def one(name: str, config: Options) -> list[Any]:
    """Time one of TARGETS."""
    options: dict[str, Any] = {"units": UPDATES}
    if name.startswith("cnf"):
        given = problem(64 if name.startswith("cnf64") else 2, name.endswith("grad"))
        peers = {OURS: ours, "diffrax": with_diffrax, "torchdiffeq": with_torchdiffeq}
        makers: dict[str, Any] = {peer: partial(make, given) for peer, make in peers.items()}
        options = {"calls": 5, "checks": from_torchdiffeq}
    elif name == "fm":
        makers = {OURS: partial(matching, None), "torchcfm": partial(with_torchcfm, False)}
        options["work"] = lambda: {"flops": 6.0 * BATCH * (3 * 64 + 2 * 64 * 64 + 64 * 2)}
    else:
        makers = {
            OURS: partial(matching, sinkhorn_plan(0.05)),
            "torchcfm": partial(with_torchcfm, True),
            "genjax_exact": partial(matching, exact_assignment),
        }
    return compare(name, makers, config, targets=TARGETS[name], **options)


main = every(one, TARGETS)
if __name__ == "__main__":
    launch(main)
