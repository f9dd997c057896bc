"""Time of RealNVP beside flowjax, distrax, zuko and nflows, on CPU.

    realnvp_train, realnvp_sample   8 affine couplings, MLP 2 x 128 ReLU, 64 dimensions, batch 512
      flowjax, distrax, zuko, nflows    each with its own masks or permutations

`from_distrax` is the relative difference of log p from distrax's with the same weights. Continuous
flows and flow matching: experiments.benchmarks.flow_paths.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks._models import plain_trainer, torch_trainer, waiting
from experiments.benchmarks._workload import OURS, Options, Row, Side, compare, every, launch
from genjax import flows
from genjax.networks import RealNVP

Config = Options
TARGETS = {"realnvp_train": {"flowjax": 1.6, "distrax": 1.6}, "realnvp_sample": 1.4}
D, COUPLINGS, WIDTH, BATCH = 64, 8, 128, 512


def data() -> np.ndarray:
    return (np.random.RandomState(0).randn(BATCH, D) * 0.7 + 0.3).astype(np.float32)


def realnvp() -> tuple[flows.Bijection, Any]:
    """Make genjax's flow, and its parameters at the start."""
    module = RealNVP(COUPLINGS, (WIDTH, WIDTH), flows.affine(1.0), activation=jax.nn.relu)
    params = module.init(jax.random.key(0), jnp.zeros((1, D)))
    return flows.Bijection(module.apply, lambda p, z: module.apply(p, z, inverse=True)), params


def jax_flow(name: str) -> tuple[Any, Any, Any]:
    """(params, log_prob(params, x), sample(params, key)) of genjax, flowjax or distrax."""
    if name == OURS:
        (bijection, params), base = realnvp(), flows.normal((D,))
        score = partial(flows.log_prob, bijection, base)
        return params, score, lambda p, k: flows.sample(bijection, base, p, k, BATCH)
    if name == "distrax":
        import distrax  # noqa: F401

        score = lambda p, x: distrax_flow(p).log_prob(x)  # noqa: E731
        draw = lambda p, k: distrax_flow(p).sample(seed=k, sample_shape=(BATCH,))  # noqa: E731
        return realnvp()[1], score, draw
    import equinox as eqx
    import paramax
    from flowjax.bijections import Affine
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    sizes = {"flow_layers": COUPLINGS, "nn_width": WIDTH, "nn_depth": 2}
    parts = {"base_dist": Normal(jnp.zeros(D)), "transformer": Affine()}
    made = coupling_flow(jax.random.key(0), **parts, **sizes)
    fixed = lambda x: isinstance(x, paramax.NonTrainable)  # noqa: E731
    params, static = eqx.partition(made, eqx.is_inexact_array, is_leaf=fixed)
    whole = lambda p: paramax.unwrap(eqx.combine(p, static))  # noqa: E731
    return params, lambda p, x: whole(p).log_prob(x), lambda p, k: whole(p).sample(k, (BATCH,))


def jax_side(name: str, mode: str) -> Side:
    """A training step or a sampling of genjax, flowjax or distrax."""
    params, score, draw = jax_flow(name)
    if mode == "sample":
        return waiting(jax.jit(draw), params, jax.random.key(1))
    return plain_trainer(lambda p, key, x: (-score(p, x), {}), params, jnp.asarray(data()))


def torch_flow(name: str) -> Any:
    """(module, log_prob(x), sample()) of zuko or nflows."""
    import torch

    if name == "zuko":
        import zuko

        made = zuko.flows.RealNVP(features=D, transforms=COUPLINGS, hidden_features=(WIDTH, WIDTH))
        return made, lambda x: made().log_prob(x), lambda: made().sample((BATCH,))
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.nn.nets.mlp import MLP
    from nflows.transforms.base import CompositeTransform
    from nflows.transforms.coupling import AffineCouplingTransform

    class Net(MLP):
        def forward(self, inputs: Any, context: Any = None) -> Any:
            return super().forward(inputs)

    def layer(i: int) -> Any:
        mask = torch.ones(D)
        mask[::2] = -1
        mask = mask if i % 2 else -mask
        return AffineCouplingTransform(mask, lambda a, b: Net([a], [b], [WIDTH, WIDTH]))

    made = Flow(CompositeTransform([layer(i) for i in range(COUPLINGS)]), StandardNormal([D]))
    return made, made.log_prob, lambda: made.sample(BATCH)


def torch_side(name: str, mode: str) -> Side:
    import torch

    made, score, draw = torch_flow(name)
    if mode == "sample":
        return torch.no_grad()(draw)
    x = torch.from_numpy(data())
    return torch_trainer(made.parameters(), lambda: -score(x).mean())


def distrax_flow(params: Any) -> Any:
    """The same flow of the same weights, of distrax's split couplings."""
    import distrax

    def conditioner(i: int, h: Any) -> Any:
        net = params["params"][f"conditioner_{i}"]
        dense = [(net[f"Dense_{j}"]["kernel"], net[f"Dense_{j}"]["bias"]) for j in range(3)]
        h = jax.nn.relu(h @ dense[0][0] + dense[0][1])
        h = h + jax.nn.relu(h @ dense[1][0] + dense[1][1])
        return h @ dense[2][0] + dense[2][1]

    def bijector(p: Any) -> Any:
        return distrax.ScalarAffine(p[..., D // 2 :], log_scale=jnp.tanh(p[..., : D // 2]))

    layers = [
        distrax.SplitCoupling(D // 2, 1, partial(conditioner, i), bijector, swap=bool(i % 2))
        for i in range(COUPLINGS)
    ]
    base = distrax.MultivariateNormalDiag(jnp.zeros(D), jnp.ones(D))
    return distrax.Transformed(base, distrax.Inverse(distrax.Chain(layers[::-1])))


def from_distrax(results: Any) -> dict[str, dict[str, float]]:
    """Largest relative difference of log p from distrax's, away from the identity start."""
    if "distrax" not in results:
        return {}
    bijection, params = realnvp()
    keys = iter(jax.random.split(jax.random.key(2), 100))
    params = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(next(keys), p.shape), params)
    x = jnp.asarray(data())
    ours = flows.log_prob(bijection, flows.normal((D,)), params, x)
    gap = jnp.max(jnp.abs(ours / distrax_flow(params).log_prob(x) - 1))
    return {OURS: {"from_distrax": float(gap)}}


def one(name: str, config: Options) -> list[Row]:
    """Time one of TARGETS."""
    mode = name.removeprefix("realnvp_")
    makers = {peer: partial(jax_side, peer, mode) for peer in (OURS, "flowjax", "distrax")}
    makers |= {peer: partial(torch_side, peer, mode) for peer in ("zuko", "nflows")}

    def work() -> dict[str, float]:
        dense = sum(leaf.size for leaf in jax.tree.leaves(realnvp()[1]) if leaf.ndim == 2)
        # A product with each weight forward, and two more for its gradient.
        return {"flops": (6.0 if mode == "train" else 2.0) * BATCH * dense}

    options = {"targets": TARGETS[name], "checks": from_distrax, "calls": 5}
    return compare(name, makers, config, work=work, **options)


main = every(one, TARGETS)
if __name__ == "__main__":
    launch(main)
