"""Every public loss, found by introspection, obeys the laws; a loss that breaks one is caught."""

import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from genjax import adversarial, diffusion, flows, variational
from tests import laws
from tests.laws import Case

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(3, 3)) / 2, jnp.float32)
LEVELS = jnp.asarray(RNG.integers(0, 2, (4, 3)), jnp.float32)
BITS = LEVELS.astype(jnp.int32)
VE = diffusion.VarianceExploding(0.1, 10.0)


def encode(x):
    return x @ W, 0.1 * x


def gaussian(x, z):
    return variational.gaussian_log_likelihood(x, z @ W)


def network(x, t):
    return jnp.tanh(x @ W.astype(x.dtype)) / (1 + t.astype(x.dtype)[:, None])


def critic(x):
    return jnp.sum(jnp.tanh(x @ W.astype(x.dtype)), axis=1)


MIXTURE = diffusion.GaussianMixture(
    means=jnp.zeros((2, 3)), covariances=jnp.stack([jnp.eye(3)] * 2), weights=jnp.ones(2) / 2
)
PPCA = variational.ppca_fit(jnp.asarray(RNG.normal(size=(50, 3)), jnp.float32), 1)
FLOW = flows.chain([flows.actnorm(), flows.planar()])
FLOW_PARAMS = (
    {"log_scale": jnp.zeros(3), "shift": jnp.ones(3)},
    flows.planar_init(jax.random.key(1), 3),
)

V = variational
CASES = {
    "elbo": Case(lambda k, x: V.elbo(encode, gaussian, k, x), (X,), extremes=(0.0, 10.0, -10.0)),
    "iwae": Case(
        lambda k, x: V.iwae(encode, gaussian, k, x, num_samples=3), (X,), extremes=(0.0, 10.0)
    ),
    "gaussian_kl": Case(lambda k, m, s: V.gaussian_kl(m, s), (X, Y), extremes=(0.0, 80.0, -80.0)),
    "gaussian_kl_between": Case(
        lambda k, m, s: V.gaussian_kl_between(m, s, s, m), (X, Y), extremes=(0.0, 40.0, -40.0)
    ),
    "gaussian_log_prob": Case(lambda k, x, m: V.gaussian_log_prob(x, m, 0 * m), (X, Y)),
    "gaussian_log_likelihood": Case(lambda k, x, m: V.gaussian_log_likelihood(x, m), (X, Y)),
    "standard_normal_log_prob": Case(lambda k, x: V.standard_normal_log_prob(x), (X,)),
    "bernoulli_log_likelihood": Case(
        lambda k, logits: V.bernoulli_log_likelihood(LEVELS, logits), (X,), (0.0, 200.0, -200.0)
    ),
    "categorical_log_likelihood": Case(
        lambda k, logits: V.categorical_log_likelihood(BITS, jnp.stack([logits, -logits], -1)),
        (X,),
        extremes=(0.0, 200.0, -200.0),
    ),
    "logistic_log_likelihood": Case(
        lambda k, m: V.logistic_log_likelihood(BITS, m, 0 * m, levels=2), (X,), (0.0, 50.0, -50.0)
    ),
    "logistic_mixture_log_likelihood": Case(
        lambda k, m: V.logistic_mixture_log_likelihood(
            BITS, *(jnp.stack([s * m, m], -1) for s in (0, 1, 0)), levels=2
        ),
        (X,),
        extremes=(0.0, 50.0, -50.0),
    ),
    "ppca_log_likelihood": Case(lambda k, x: V.ppca_log_likelihood(PPCA, x), (X,)),
    "gradient_penalty": Case(lambda k, x, y: adversarial.gradient_penalty(critic, k, x, y), (X, Y)),
    "r1_penalty": Case(lambda k, x: adversarial.r1_penalty(critic, x), (X,)),
    "r2_penalty": Case(lambda k, x: adversarial.r2_penalty(critic, x), (X,)),
    "denoising_score_matching": Case(
        lambda k, x: diffusion.denoising_score_matching(network, k, x, process=VE), (X,)
    ),
    "variational_bound": Case(
        lambda k, x: diffusion.variational_bound(
            network, k, x, process=diffusion.VariancePreserving(), num_steps=5, levels=2
        ),
        (2 * LEVELS - 1,),
        extremes=(-1.0, 1.0),
    ),
    "log_likelihood": Case(
        lambda k, x: diffusion.log_likelihood(network, x, process=VE, num_steps=4), (X,)
    ),
    "mixture_log_prob": Case(
        lambda k, x: diffusion.mixture_log_prob(MIXTURE, x, jnp.ones(4), process=VE), (X,)
    ),
    "loss_weight": Case(
        lambda k, t: diffusion.loss_weight("edm", jnp.abs(t) + 0.1, process=VE),
        (X[:, 0],),
        extremes=(0.1, 5.0),
    ),
    "flow_matching_loss": Case(lambda k, x, y: flows.flow_matching_loss(network, k, x, y), (X, Y)),
    "curvature": Case(lambda k, x: flows.curvature(network, x, steps=3), (X,)),
    "log_prob": Case(lambda k, x: flows.log_prob(FLOW, flows.normal((3,)), FLOW_PARAMS, x), (X,)),
}
FOUND = laws.per_example_losses()


def test_every_public_loss_has_a_case():
    assert set(FOUND) - set(CASES) == set(), "give the new loss a case, so that the laws see it"
    assert set(CASES) - set(FOUND) == set()


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CASES)
def test_law(name, law, key, unchecked):
    law(CASES[name], key)


@pytest.mark.parametrize("name", FOUND)
def test_docstring(name):
    laws.check_docstring(FOUND[name])


def coupled(x: Float[Array, "batch d"]) -> Float[Array, " batch"]:
    """Sum of squares, centred over the batch: not a function of one example (squared units)."""
    return jnp.sum((x - x.mean(0, keepdims=True)) ** 2, axis=1).astype(jnp.float32)


def narrow(x: Float[Array, "batch d"]) -> Float[Array, " batch"]:
    return jnp.sum(x**2, axis=1)


def sharp(x: Float[Array, "batch d"]) -> Float[Array, " batch"]:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=1)


def reduced(x: Float[Array, "batch d"]) -> Float[Array, " batch"]:
    return jnp.sum(x.astype(jnp.float32) ** 2)


BROKEN = [
    (coupled, laws.check_depends_on_itself_alone),
    (narrow, laws.check_shape_and_dtype),
    (sharp, laws.check_gradient_at_extremes),
    (reduced, laws.check_shape_and_dtype),
]


@pytest.mark.parametrize(("loss", "law"), BROKEN, ids=lambda x: x.__name__)
def test_the_laws_find_and_catch_a_loss_that_breaks_one(loss, law, key, monkeypatch):
    module = types.ModuleType("broken.family")
    setattr(module, loss.__name__, loss)
    monkeypatch.setitem(sys.modules, "broken.family", module)
    assert laws.per_example_losses(("broken.family",)) == {loss.__name__: loss}
    with pytest.raises(AssertionError):
        law(Case(lambda k, x: loss(x), (X,)), key)
    if not inspect.getdoc(loss):
        with pytest.raises((AssertionError, IndexError)):
            laws.check_docstring(loss)
