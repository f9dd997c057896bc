"""Callers' functions may hold `jax.custom_vjp` functions, integers, and traced context.

One table of what takes a caller's function. Each entry gives the same value and gradients with a
function that refuses forward mode as with its plain twin, under jit, closed over traced labels.
"""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import adversarial, diffusion, flows, ode, transport, variational
from tests import laws

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32) for _ in range(2))
W = jnp.asarray(RNG.normal(size=(3, 3)) / 2, jnp.float32)
LABEL = jnp.array([0, 1, 1, 2])
VE = diffusion.VarianceExploding(0.1, 10.0)
PROBES = jnp.sign(jnp.asarray(RNG.normal(size=(2, 4, 3)), jnp.float32))


@jax.custom_vjp
def bent(x):
    return jnp.tanh(x)


# The rule is nonlinear where the cotangent is large, as that of a clipped gradient.
bent.defvjp(
    lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, g: (jnp.clip(g, -1e9, 1e9) * (1 - y**2),)
)


def network(bend, w, label):
    """(x, t) -> x, closed over parameters and labels."""
    return lambda x, t: bend(x @ w) * (1 + label[:, None]) / (2 + t[:, None])


def critic(bend, w, label):
    return lambda x: jnp.sum(bend(x @ w) * (1 + label[:, None]), axis=1)


def encode(bend, w, label):
    return lambda x: (bend(x @ w) + label[:, None], 0.1 * x)


def likelihood(bend, w):
    return lambda x, z: variational.gaussian_log_likelihood(x, bend(z @ w))


def continuous(bend, w, label, **options):
    flow = flows.continuous_flow(
        lambda p, x, t: network(bend, p, label)(x, t), num_steps=2, **options
    )
    return flows.log_prob(flow, flows.normal((3,)), w, X)


class Bent(diffusion.VarianceExploding):
    """A schedule of the caller's own."""

    bend = staticmethod(jnp.tanh)

    def variance(self, t):
        return super().variance(t) * (2 + self.bend(jnp.asarray(t)))


def process(bend):
    return type("Process", (Bent,), {"bend": staticmethod(bend)})(0.1, 10.0)


def guided(bend, w, label, covariance):
    denoise = diffusion.pseudoinverse_guidance(
        network(bend, w, label), lambda x: x[:, :2], X[:, :2], process=VE, noise_std=0.2,
        covariance=covariance, num_steps=2,
    )  # fmt: skip
    return denoise(X, jnp.ones(4))


def sampled(bend, w, label, step, **options):
    return diffusion.sample(
        network(bend, w, label), KEY, (4, 3), times=jnp.array([0.5, 0.3, 0.1]), step=step,
        process=VE, **options,
    )  # fmt: skip


A, D, F, V = adversarial, diffusion, flows, variational
# function or "function, how": (the caller's bend, parameters, labels) -> numbers
TABLE = {
    "gradient_penalty": lambda b, w, n: A.gradient_penalty(critic(b, w, n), KEY, X, Y),
    "r1_penalty": lambda b, w, n: A.r1_penalty(critic(b, w, n), X),
    "r2_penalty": lambda b, w, n: A.r2_penalty(critic(b, w, n), X),
    "divergence, exact": lambda b, w, n: ode.divergence(
        lambda x: network(b, w, n)(x, jnp.ones(4)), X
    ),
    "divergence, one probe": lambda b, w, n: ode.divergence(
        lambda x: network(b, w, n)(x, jnp.ones(4)), X, PROBES[0]
    ),
    "divergence, probes": lambda b, w, n: ode.divergence(
        lambda x: network(b, w, n)(x, jnp.ones(4)), X, PROBES
    ),
    "continuous_flow": continuous,
    "continuous_flow, adjoint": lambda b, w, n: continuous(b, w, n, gradient="adjoint"),
    "continuous_flow, probe": lambda b, w, n: continuous(b, w, n, probe=PROBES[0]),
    "integrate": lambda b, w, n: F.integrate(network(b, w, n), X, num_steps=2),
    "curvature": lambda b, w, n: F.curvature(network(b, w, n), X, num_steps=2),
    "flow_matching_loss": lambda b, w, n: F.flow_matching_loss(network(b, w, n), KEY, X, Y),
    "interpolate": lambda b, w, n: F.interpolate(
        F.Path(lambda t: b(t * w[0, 0]), lambda t: 1 - b(t)), X, Y, jnp.linspace(0, 1, 4)
    ),
    "preconditioned": lambda b, w, n: F.preconditioned(
        network(b, w, n), path=F.Path(lambda t: b(t * w[0, 0]), lambda t: 1 - b(t))
    )(X, jnp.linspace(0, 1, 4)),
    "log_likelihood": lambda b, w, n: D.log_likelihood(
        network(b, w, n), X, process=VE, num_steps=2
    ),
    "log_likelihood, probe": lambda b, w, n: D.log_likelihood(
        network(b, w, n), X, process=VE, num_steps=2, key=KEY
    ),
    "denoising_score_matching": lambda b, w, n: D.denoising_score_matching(
        network(b, w, n), KEY, X, process=VE
    ),
    "Process": lambda b, w, n: [
        f(jnp.linspace(0.1, 0.9, 4) * w[0, 0] ** 2)
        for f in (process(b).drift, process(b).diffusion_squared, process(b).diffusion)
    ],
    "pseudoinverse_guidance": lambda b, w, n: guided(b, w, n, "isotropic"),
    "pseudoinverse_guidance, tweedie": lambda b, w, n: guided(b, w, n, "tweedie"),
    "posterior_sampling": lambda b, w, n: sampled(
        b, w, n, D.posterior_sampling(lambda x: x[:, :2], X[:, :2], step=D.ddim_step, scale=0.1)
    ),
    "sample": lambda b, w, n: sampled(b, w, n, D.dpm_solver_step),
    "sample, noisy": lambda b, w, n: sampled(b, w, n, D.euler_maruyama_step),
    "elbo": lambda b, w, n: V.elbo(encode(b, w, n), likelihood(b, w), KEY, X)[0],
    "iwae": lambda b, w, n: V.iwae(encode(b, w, n), likelihood(b, w), KEY, X, num_samples=2)[0],
    "iwae, dreg": lambda b, w, n: V.iwae(
        encode(b, w, n), likelihood(b, w), KEY, X, num_samples=2, estimator="dreg"
    )[0],
    "f_divergence": lambda b, w, n: A.f_divergence(
        "kl", lambda x: -jnp.sum(x**2, 1), lambda x: critic(b, w, n)(x), X
    ),
    "sinkhorn": lambda b, w, n: transport.sinkhorn(
        X, Y, epsilon=1.0, num_iterations=5,
        cost_fn=lambda x, y: b(transport.squared_euclidean(x @ w, y)) + 0 * n[0],
    ).value,
    "sinkhorn, plan": lambda b, w, n: transport.sinkhorn(
        X, Y, epsilon=1.0,
        cost_fn=lambda x, y: b(transport.squared_euclidean(x @ w, y)) + 0 * n[0],
    ).plan(),
    "sinkhorn, unrolled": lambda b, w, n: transport.sinkhorn(
        X, Y, epsilon=1.0, num_iterations=5, gradient="unroll",
        cost_fn=lambda x, y: b(transport.squared_euclidean(x @ w, y)) + 0 * n[0],
    ).value,
    "unbalanced_sinkhorn": lambda b, w, n: transport.unbalanced_sinkhorn(
        X, Y, epsilon=1.0, marginal_penalty=2.0, tolerance=1e-6,
        cost_fn=lambda x, y: b(transport.squared_euclidean(x @ w, y)) + 0 * n[0],
    ).plan(),
    "denoiser": lambda b, w, n: D.denoiser(network(b, w, n), process=VE)(X, jnp.ones(4)),
    "classifier_guidance": lambda b, w, n: D.classifier_guidance(
        network(b, w, n), lambda x, t: critic(b, w, n)(x), process=VE, scale=1.0
    )(X, jnp.ones(4)),
    "denoise": lambda b, w, n: F.denoise(critic(b, w, n), X, 0.1),
}  # fmt: skip
# Public functions that only call what they are given, as others do that have an entry.
CALLS_ONLY = {
    "sinkhorn_divergence", "sinkhorn_loss", "minibatch_energy_distance", "variational_bound",
    "unbalanced_divergence",
    "flow_denoiser", "loss_weight", "classifier_free_guidance", "clipped", "dynamic_thresholding",
    "replacement", "inpaint", "dpm_solver_step", "unipc_step", "sample_adaptive", "scan_steps",
    "trajectory",
    "ancestral_step", "ddim_step", "ddpm_step", "euler_maruyama_step", "euler_step", "heun_step",
    "predictor_corrector_step", "alternating_couplings", "coupling", "masked_autoregressive",
    "masked_coupling", "solve", "solve_with_log_det", "sample_pairs", "reflow_pairs",
    "consistency_function", "consistency_loss", "consistency_sample", "mean_flow_loss",
    "mean_flow_sample", "shortcut_loss", "trig_consistency_loss", "trig_function",
}  # fmt: skip
# A call that differentiates in forward mode what the caller may have given.
FORWARD = re.compile(r"\b(jvp|linearize|jacfwd|hessian)\(")


def outcomes(make, bend, w, label):
    """Values, and the gradient of a sum of their sines with respect to the parameters."""

    def total(w):
        values = [
            v for v in jax.tree.leaves(make(bend, w, label))
            if jnp.issubdtype(v.dtype, jnp.floating)
        ]  # fmt: skip
        return sum(jnp.sum(jnp.sin(v)) for v in values), values

    return jax.value_and_grad(total, has_aux=True)(w)


# A second way of the same function is a slow test.
WAYS = [
    pytest.param(n, marks=[pytest.mark.slow] if "," in n and ", exact" not in n else [])
    for n in TABLE
]


@pytest.mark.parametrize("name", WAYS)
def test_a_function_without_forward_mode_gives_the_same(name):
    both = jax.jit(lambda w, n: [outcomes(TABLE[name], bend, w, n) for bend in (jnp.tanh, bent)])
    plain, other = both(W, LABEL)
    assert jnp.any(plain[1] != 0), "no gradient reaches the caller's parameters"
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_who_differentiates_in_forward_mode_has_an_entry():
    """A public function of a family whose file has such a call, and that takes a function."""
    found = laws.public_functions((*laws.FAMILIES, "ode"))
    takes = {
        name.rpartition(".")[2]
        for name, function in found.items()
        if function.__module__ not in ("genjax.numerics", "genjax.randomness")
        and any(
            "Callable" in str(p.annotation) for p in inspect.signature(function).parameters.values()
        )
        and FORWARD.search(Path(inspect.getfile(inspect.unwrap(function))).read_text())
    }
    tried = {name.partition(",")[0] for name in TABLE} | CALLS_ONLY
    assert not takes - tried, f"give {sorted(takes - tried)} an entry"
