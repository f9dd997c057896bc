"""Every public loss, found by introspection, obeys the laws; a loss that breaks one is caught."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import adversarial, alignment, autoregressive, diffusion, flows, transport, variational
from tests import laws, token_cases
from tests.broken_losses import BROKEN, BROKEN_OBJECTIVES, Batch, Scalar, good, of_two
from tests.laws import Case, Objective

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


def two_features(x):
    return [encode(x), encode(x)]


LEVELS_OF_LATENTS = [
    variational.Level(None, lambda h, q: q, lambda h, z: z),
    variational.Level(lambda h: (h @ W, 0.1 * h), lambda h, q: q, lambda h, z: h + z),
]


def network(x, t):
    return jnp.tanh(x @ W.astype(x.dtype)) / (1 + t.astype(x.dtype)[:, None])


def half_network(x, t):
    return 0.5 * network(x, t)


def mean_network(x, t, s):
    return network(x, t) * s.astype(x.dtype)[:, None]


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
    "aggregated_log_prob": Case(lambda k, z: V.aggregated_log_prob(z, Y, 0.1 * Y, block=3), (X,)),
    "vamp_log_prob": Case(lambda k, z: V.vamp_log_prob(encode, Y, z), (X,)),
    "concrete_log_prob": Case(
        lambda k, y: V.concrete_log_prob(jax.nn.sigmoid(y), X.astype(y.dtype), temperature=0.7),
        (Y,),
        extremes=(0.0, 80.0, -80.0),
    ),
    "categorical_kl": Case(lambda k, x: V.categorical_kl(x, Y[0]), (X,)),
    "score_function": Case(lambda k, p, r: V.score_function(p, r, 0.5), (X[:, 0], Y[:, 0])),
    "hierarchical_elbo": Case(
        lambda k, x: V.hierarchical_elbo(two_features, LEVELS_OF_LATENTS, gaussian, k, x),
        (X,),
        extremes=(0.0, 10.0, -10.0),
    ),
    "hierarchical_iwae": Case(
        lambda k, x: V.hierarchical_iwae(
            two_features, LEVELS_OF_LATENTS, gaussian, k, x, num_samples=3
        ),
        (X,),
        extremes=(0.0, 10.0),
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
        (LEVELS - 0.5,),
        extremes=(-0.5, 0.5),
    ),
    "hybrid_loss": Case(
        lambda k, x: diffusion.hybrid_loss(
            lambda x, t: (network(x, t), half_network(x, t)),
            k,
            x,
            process=diffusion.VariancePreserving(),
            num_steps=5,
            levels=2,
        ),
        (LEVELS - 0.5,),
        extremes=(-0.5, 0.5),
    ),
    "consistency_loss": Case(
        lambda k, x: diffusion.consistency_loss(network, k, x, num_levels=11), (X,)
    ),
    "trig_consistency_loss": Case(
        lambda k, x: diffusion.trig_consistency_loss(network, k, x), (X,)
    ),
    "progressive_distillation_loss": Case(
        lambda k, x: diffusion.progressive_distillation_loss(
            network, half_network, k, x, process=diffusion.Cosine(), num_steps=4
        ),
        (X,),
    ),
    "distribution_matching_loss": Case(
        lambda k, x: diffusion.distribution_matching_loss(network, half_network, k, x, process=VE),
        (X,),
    ),
    "log_likelihood": Case(
        lambda k, x: diffusion.log_likelihood(network, x, process=VE, num_steps=4), (X,)
    ),
    "mixture_log_prob": Case(
        lambda k, x: V.mixture_log_prob(x, Y[:2], 0 * Y[:2]), (X,), extremes=(0.0, 10.0, -10.0)
    ),
    "diffusion.mixture_log_prob": Case(
        lambda k, x: diffusion.mixture_log_prob(MIXTURE, x, jnp.ones(4, jnp.float32), process=VE),
        (X,),
    ),
    "loss_weight": Case(
        lambda k, t: diffusion.loss_weight("edm", jnp.abs(t) + 0.1, process=VE),
        (X[:, 0],),
        extremes=(0.1, 5.0),
    ),
    "flow_matching_loss": Case(lambda k, x, y: flows.flow_matching_loss(network, k, x, y), (X, Y)),
    "mean_flow_loss": Case(lambda k, x, y: flows.mean_flow_loss(mean_network, k, x, y), (X, Y)),
    "shortcut_loss": Case(lambda k, x, y: flows.shortcut_loss(mean_network, k, x, y), (X, Y)),
    "bridge_matching_loss": Case(
        lambda k, x, y: flows.bridge_matching_loss(network, k, x, y, sigma=0.5), (X, Y)
    ),
    "curvature": Case(lambda k, x: flows.curvature(network, x, num_steps=3), (X,)),
    "next_token": Case(
        lambda k, z: autoregressive.next_token(lambda _: jnp.stack([z, -z], -1), BITS, z_loss=1e-4),
        (X,),
    ),
    "colour_logistic_mixture": Case(
        lambda k, z: autoregressive.colour_logistic_mixture(
            BITS[:, :1, None, None], z.reshape(*z.shape[:-1], 1, 1, *z.shape[-1:]), levels=2
        ),
        (X,),
        extremes=(0.0, 50.0, -50.0),
    ),
    "log_prob": Case(lambda k, x: flows.log_prob(FLOW, flows.normal((3,)), FLOW_PARAMS, x), (X,)),
}

CASES |= token_cases.CASES

T = transport
A, B = X[:, :2], 0.8 * jnp.concatenate([Y, Y[::-1] + 0.3])[:, :2] + 0.5
SCORES = (X[:, 0], jnp.concatenate([Y[:, 0], Y[:, 1]]))
UNBOUNDED = (0.0, 1e3, -1e3)
BOUNDED = (0.0, 80.0, -80.0)  # those that are exponential in the scores
OT = {"epsilon": 0.5, "num_iterations": 30}  # as many for all: a smaller program than a loop

RELAXED = {"epsilon": 0.5, "marginal_penalty": 1.0, "tolerance": 1e-5}


def scored(objective, extremes=UNBOUNDED, **options):
    """An objective of scores, which takes a mask for either side."""
    return Objective(
        lambda real, fake: objective(real, fake, **options),
        SCORES,
        lambda real, fake, *masks: objective(real, fake, where=masks, **options),
        extremes=extremes,
    )


def weigh(mask):
    return mask / jnp.sum(mask)


def solved(objective, **options):
    """An objective of transport, which takes weights for either side; 0 for a point drops it."""
    return Objective(
        lambda x, y: objective(x, y, **options),
        (A, B),
        lambda x, y, *masks: objective(x, y, a=weigh(masks[0]), b=weigh(masks[1]), **options),
        poison=3.0,
        extremes=(0.0, 10.0),
        rtol=2e-3,
    )


def density_ratio(samples, where=None):
    return adversarial.f_divergence(
        "jensen_shannon",
        V.standard_normal_log_prob,
        lambda x: V.standard_normal_log_prob(x - 0.5),
        samples,
        where=where,
    )


OBJECTIVES = {
    "gan": scored(adversarial.gan),
    "f_gan": scored(lambda *scores, **where: adversarial.f_gan("pearson", *scores, **where)),
    "donsker_varadhan": scored(adversarial.donsker_varadhan),
    "nwj": scored(adversarial.nwj, BOUNDED),
    "wasserstein": scored(adversarial.wasserstein),
    "hinge": scored(adversarial.hinge),
    "least_squares": scored(adversarial.least_squares),
    "relativistic": Objective(
        adversarial.relativistic,
        (X[:, 0], Y[:, 0]),
        lambda real, fake, *masks: adversarial.relativistic(real, fake, where=masks),
        paired=True,
    ),
    "f_divergence": Objective(
        lambda x: density_ratio(x), (X,), lambda x, mask: density_ratio(x, mask), extremes=(0, 10.0)
    ),
    "kto_reference_point": Objective(
        alignment.kto_reference_point,
        SCORES[:1],
        lambda x, mask: alignment.kto_reference_point(x, where=mask),
    ),
    "sinkhorn": solved(T.sinkhorn, **OT),
    "sinkhorn_divergence": solved(T.sinkhorn_divergence, **OT),
    "sinkhorn_loss": solved(T.sinkhorn_loss, **OT),
    "unbalanced_sinkhorn": solved(T.unbalanced_sinkhorn, **RELAXED),
    "unbalanced_divergence": solved(T.unbalanced_divergence, **RELAXED),
    "transport_1d": Objective(
        T.transport_1d,
        SCORES,
        lambda x, y, *masks: T.transport_1d(x, y, a=weigh(masks[0]), b=weigh(masks[1])),
        poison=3.0,
    ),
    "minibatch_energy_distance": Objective(
        lambda *clouds: T.minibatch_energy_distance(*clouds, **OT),
        (X, X + 0.1 * Y, Y, Y[::-1] + 0.2 * X),
        extremes=(0.0, 10.0),
        rtol=2e-3,
    ),
}
NOT_OF_SAMPLES = {
    "adapt_beta": "of two numbers",
    "gaussian_entropic_ot": "of moments",
    "gaussian_wasserstein": "of moments",
    "barycentre": "of histograms",
    "sinkhorn_from_cost": "of a cost matrix",
    "sinkhorn_from_ott": "of a geometry",
    "ppca_fit": "a fit",
    "path_length_penalty": "of a generator and its styles",
    "ada_update": "a controller",
    "perplexity": "of indices",
    "lookup_free_quantise": "codes and their entropies",
}
LOSSES, FOUND = laws.per_example_losses(), laws.objectives()


def test_every_public_loss_has_a_case():
    assert set(LOSSES) == set(CASES), "give the new loss a case, so that the laws see it"
    assert set(FOUND) == set(OBJECTIVES) | set(NOT_OF_SAMPLES), "give the new objective a case"


def each_law(found):
    """Eager forms, a program for each operation, are slow tests."""
    marks = lambda law: [pytest.mark.slow] if "eager" in law.__name__ else []  # noqa: E731
    params = [pytest.param(law, id=law.__name__, marks=marks(law)) for law in found]
    return pytest.mark.parametrize("law", params)


# It is three solves of unbalanced_sinkhorn, which has a row of its own: slow tests.
THRICE = ("unbalanced_divergence",)
WAYS = [pytest.param(n, marks=[pytest.mark.slow] if n in THRICE else []) for n in OBJECTIVES]


@each_law(laws.LAWS)
@pytest.mark.parametrize("name", CASES)
def test_law(name, law, key, unchecked):
    law(CASES[name], key)


@each_law(laws.OBJECTIVE_LAWS)
@pytest.mark.parametrize("name", WAYS)
def test_law_of_objectives(name, law, unchecked):
    law(OBJECTIVES[name])


@pytest.mark.parametrize("name", [*CASES, *OBJECTIVES])
def test_docstring(name):
    laws.check_docstring((LOSSES | FOUND)[name])


def test_every_public_function_says_what_it_returns():
    for function in laws.public_functions((*laws.FAMILIES, *laws.GROUND)).values():
        if function.__module__.startswith("genjax."):
            laws.check_annotations(function)


def test_the_laws_hold_for_losses_that_obey_them(key):
    for law in laws.LAWS:
        law(Case(lambda k, x: good(x), (X,)), key)
    for law in laws.OBJECTIVE_LAWS:
        law(Objective(of_two, (X, Y)))
    laws.check_docstring(good)
    laws.check_docstring(of_two)


@pytest.mark.parametrize("loss", [*BROKEN, *BROKEN_OBJECTIVES], ids=lambda f: f.__name__)
def test_a_loss_that_breaks_a_law_is_found_and_caught(loss, key, monkeypatch):
    module = types.ModuleType("broken.family")
    setattr(module, loss.__name__, loss)
    monkeypatch.setitem(sys.modules, "broken.family", module)
    find = laws.per_example_losses if loss in BROKEN else laws.objectives
    assert find(("broken.family",)) == {loss.__name__: loss}
    if loss in BROKEN:
        still = lambda k, x: loss(x + 0 * jax.random.uniform(k, dtype=x.dtype))  # noqa: E731
        case = Case(still, (X,))
        law = functools.partial(BROKEN[loss], case, key)
    else:
        law = functools.partial(BROKEN_OBJECTIVES[loss], Objective(loss, (X, Y)))
    with pytest.raises((AssertionError, pytest.fail.Exception, NotImplementedError)):
        law()
    with pytest.raises(AssertionError):
        laws.check_docstring(loss)


def test_an_objective_before_its_terms_is_found(monkeypatch):
    def with_terms(x: Batch, y: Batch) -> tuple[Scalar, dict[str, Scalar]]:
        return of_two(x, y), {}

    module = types.ModuleType("broken.family")
    module.with_terms = with_terms
    monkeypatch.setitem(sys.modules, "broken.family", module)
    assert laws.objectives(("broken.family",)) == {"with_terms": with_terms}


def test_a_mask_that_is_not_heeded_is_caught():
    ignored = Objective(of_two, (X, Y), lambda x, y, *masks: of_two(x, y))
    with pytest.raises(AssertionError):
        laws.check_masked_is_dropped(ignored)


def test_a_loss_without_a_type_is_caught():
    with pytest.raises(AssertionError, match="no annotation"):
        laws.check_annotations(lambda x: x)
