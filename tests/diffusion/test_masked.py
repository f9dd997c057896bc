"""Masked diffusion: bounds by enumeration over masks, the sampler's law by enumeration of strings.

Chances are checked on many rows at once, with seeds fixed: means within 4 standard errors, counts
by chi-square at 1e-4.
"""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax

from genjax import diffusion as gd

STORED = json.loads(
    (Path(__file__).parents[1] / "references" / "masked_diffusion_bound.json").read_text()
)
INPUTS, EXPECTED = STORED["inputs"], STORED["expected"]
V = INPUTS["vocabulary"]
X = np.array(INPUTS["x"])
HIDDEN = np.array([entry["mask"] for entry in INPUTS["logits_by_mask"]], bool)
NLL = np.array([entry["value"] for entry in EXPECTED["masked_nll"]])
NUMBER = HIDDEN @ np.array([4, 2, 1])  # a mask as a number, 1 .. 7
ROWS = 4096


TABLE = np.zeros((8, 3, V))
TABLE[NUMBER] = [entry["logits"] for entry in INPUTS["logits_by_mask"]]


def predict(z):
    """The network of the reference: a table over masks."""
    return jnp.asarray(TABLE)[(z == V) @ jnp.array([4, 2, 1])]


def rows(count):
    return jnp.asarray(np.tile(X, (count, 1)))


def of_each_mask(share):
    """Probability of each of the seven masks."""
    return share ** HIDDEN.sum(1) * (1 - share) ** (~HIDDEN).sum(1)


def in_the_mean(losses, expected, sd=4.0):
    losses = np.asarray(losses, np.float64)
    error = losses.std() / math.sqrt(len(losses))
    assert abs(losses.mean() - expected) < sd * error, (losses.mean(), expected, error)


def test_cross_entropy_of_every_mask(x64, compiled):
    """And with a column for the hidden token, whatever it holds; gradient p - one-hot."""

    def wider(z):
        column = jnp.full((*z.shape, 1), 1e4)
        return jnp.concatenate([predict(z), column], axis=-1)

    @compiled
    def run(logits, x, hidden):
        loss = partial(gd.masked_cross_entropy, x=x, hidden=hidden, vocabulary=V)
        gradient = jax.grad(lambda y: loss(lambda _: y).sum())(logits)
        return loss(predict), loss(wider), gradient

    logits = TABLE[NUMBER]
    *found, gradient = run(jnp.asarray(logits), rows(7), jnp.asarray(HIDDEN))
    for losses in found:
        np.testing.assert_allclose(losses, NLL, rtol=1e-8)
    expected = np.where(HIDDEN[..., None], softmax(logits, axis=-1) - np.eye(V)[X][None], 0)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)


def test_the_references_are_the_enumeration(x64):
    """The bound as the sum over counts and orders, without the library's random masks."""
    by_order = sum(3 / n * NLL[HIDDEN.sum(1) == n].mean() / 3 for n in (1, 2, 3))
    np.testing.assert_allclose(by_order, EXPECTED["nelbo"], rtol=1e-8)


def which(losses, weights):
    """The mask of each row (a number 0 .. 7), read off from its loss."""
    found = np.asarray(losses) / np.asarray(weights)
    distance = np.abs(found[:, None] - np.concatenate([[0], NLL])[None])
    assert distance.min(1).max() < 1e-8
    return np.concatenate([[0], NUMBER])[distance.argmin(1)]


def fits(counts, chances):
    assert stats.chisquare(counts, chances * counts.sum()).pvalue > 1e-4


def test_masked_bound_at_a_time(x64):
    """At t = .37 each loss is the reference's for its mask, and masks come as they should."""
    expected = EXPECTED["loss_at_time"]
    times = jnp.asarray(np.full(ROWS, expected["time"]))
    losses, aux = jax.device_get(
        jax.jit(lambda key: gd.masked_bound(predict, key, rows(ROWS), vocabulary=V, times=times))(
            jax.random.key(0)
        )
    )
    masks = which(losses, np.full(ROWS, expected["weight"]))
    for entry, number in zip(expected["values"], NUMBER, strict=True):
        np.testing.assert_allclose(losses[masks == number], entry["value"], rtol=1e-8)
    chances = of_each_mask(expected["time"])
    counts = np.array([np.sum(masks == n) for n in [0, *NUMBER]])
    fits(counts, np.concatenate([[1 - chances.sum()], chances]))
    np.testing.assert_array_equal(aux["masked"], [bin(m).count("1") for m in masks])
    nothing = masks == 0
    np.testing.assert_array_equal(np.asarray(aux["cross_entropy"])[nothing], 0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "quadratic"])
def test_no_schedule_changes_the_bound(schedule):
    losses, _ = jax.jit(
        lambda key: gd.masked_bound(predict, key, rows(ROWS), vocabulary=V, schedule=schedule)
    )(jax.random.key(1))
    assert losses.dtype == jnp.float32
    in_the_mean(losses, EXPECTED["nelbo"])


def test_order_bound(x64):
    bounds = [partial(bound, predict, vocabulary=V) for bound in (gd.order_bound, gd.masked_bound)]
    run = jax.jit(lambda key, x: [bound(key, x) for bound in bounds])
    (losses, aux), (other, _) = run(jax.random.key(2), rows(ROWS))
    count = np.asarray(aux["masked"])
    masks = which(losses, 3 / count)
    np.testing.assert_array_equal(count, [bin(m).count("1") for m in masks])
    counts = np.array([np.sum(masks == n) for n in NUMBER])
    sizes = HIDDEN.sum(1)
    fits(counts, np.array([1 / 3 / math.comb(3, n) for n in sizes]))
    in_the_mean(losses, EXPECTED["nelbo"])
    assert np.std(losses) < np.std(other)


def test_step_bound(x64):
    """Eight steps: the reference's value, weights and chances; many steps: the continuous bound."""
    steps = INPUTS["steps"]
    run = jax.jit(partial(gd.step_bound, predict, vocabulary=V, num_steps=steps))
    losses, aux = run(jax.random.key(3), rows(ROWS))
    number = np.round(np.asarray(aux["time"]) * steps).astype(int)
    np.testing.assert_array_equal(np.bincount(number, minlength=9)[1:], ROWS // steps)
    chances = np.array(EXPECTED["posterior_unmask_probability"])
    which(losses, steps * chances[number - 1])
    exact = sum(chances[i] * of_each_mask((i + 1) / steps) @ NLL for i in range(steps))
    np.testing.assert_allclose(exact, EXPECTED["vlb_steps"], rtol=1e-8)
    in_the_mean(losses, exact)


def test_score_entropy_of_the_true_ratios_is_the_masked_bound(x64):
    """Equal loss by loss, with the same keys; any other score is worse in the mean."""
    share = gd.MASKING_SCHEDULES["cosine"]

    def log_score(z, t):
        ratio = jnp.log1p(-share(t)) - jnp.log(share(t))
        return ratio[:, None, None] + jax.nn.log_softmax(predict(z))

    @jax.jit
    def run(key, x, times):
        options = {"vocabulary": V, "schedule": "cosine", "times": times}
        louder = gd.score_entropy(lambda z, t: log_score(z, t) + 0.3, key, x, **options)
        found = gd.score_entropy(log_score, key, x, **options)
        return gd.masked_bound(predict, key, x, **options)[0], found[0], louder[0]

    times = jnp.asarray(np.linspace(0.01, 0.99, 512))
    expected, found, louder = run(jax.random.key(4), rows(512), times)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert np.mean(louder) > np.mean(expected)


def test_padding_and_rows():
    """Whatever padding holds; a row without tokens gives 0; NaN there leaves the gradient."""
    where = np.array([[True, True, False], [True, True, True], [False, False, False]])
    table = jnp.asarray(np.random.default_rng(5).normal(size=(4, V)).astype(np.float32))

    def network(z, shift):
        logits = (
            table[z]
            + jnp.sum(table[z], axis=1, keepdims=True)
            + shift * jnp.arange(V).reshape(1, 1, V)
        )
        return jnp.where(where[..., None], logits, jnp.nan)

    @jax.jit
    def losses(x, shift):
        key, options = jax.random.key(6), {"vocabulary": V, "where": jnp.asarray(where)}
        net = lambda z: network(z, shift)  # noqa: E731
        found = [
            gd.masked_bound(net, key, x, **options),
            gd.order_bound(net, key, x, **options),
            gd.step_bound(net, key, x, num_steps=4, **options),
        ]
        total = sum(jnp.sum(loss) for loss, _ in found)
        return total, (jnp.stack([loss for loss, _ in found]), [aux["masked"] for _, aux in found])

    gradient = jax.jit(jax.value_and_grad(losses, argnums=1, has_aux=True))
    (_, (first, masked)), slope = gradient(np.where(where, X, -7), 0.1)
    assert np.isfinite(slope)
    assert np.isfinite(first).all()
    first = np.asarray(first)
    np.testing.assert_array_equal(first[:, 2], 0)
    assert (np.stack(masked) <= np.array([[2, 3, 0]])).all()
    (_, (second, _)), _ = gradient(np.where(where, X, 99), 0.1)
    np.testing.assert_array_equal(first, second)
    changed = np.tile(X, (3, 1))
    changed[1] = 0
    third = np.asarray(gradient(changed, 0.1)[0][1][0])
    np.testing.assert_array_equal(third[:, 0], first[:, 0])
    assert not np.allclose(third[:, 1], first[:, 1])


# A joint of three binary tokens that no factorisation has, and its exact predictor.
STRINGS = np.array(list(itertools.product(range(2), repeat=3)))
LOG_JOINT = np.log(np.array([0.25, 0.02, 0.05, 0.18, 0.03, 0.22, 0.2, 0.05]))


def exact_predictor(z):
    """log p(x_i = v | visible), up to a constant: the sum over strings that agree with z."""
    agree = jnp.all((z[:, None] == 2) | (z[:, None] == STRINGS[None]), axis=2)
    log_p = jnp.where(agree, LOG_JOINT[None], -jnp.inf)
    has = STRINGS.T[None, :, :, None] == np.arange(2)[None, None, None]  # [1, 3, strings, 2]
    return jax.nn.logsumexp(jnp.where(has, log_p[:, None, :, None], -jnp.inf), axis=2)


def test_every_order_of_an_exact_predictor_gives_the_likelihood(x64):
    """The chain rule along all six orders, for all eight strings."""
    conditional = jax.jit(lambda z: jax.nn.log_softmax(exact_predictor(z)))
    for order in itertools.permutations(range(3)):
        total = np.zeros(8)
        for step in range(3):
            hidden = np.zeros((8, 3), bool)
            hidden[:, list(order[step:])] = True
            log_p = np.asarray(conditional(np.where(hidden, 2, STRINGS)))
            place = order[step]
            total += log_p[np.arange(8), place, STRINGS[:, place]]
        np.testing.assert_allclose(total, LOG_JOINT, rtol=1e-12)
    masks = np.array(list(itertools.product([False, True], repeat=3)))[1:]
    loss = jax.jit(partial(gd.masked_cross_entropy, exact_predictor, vocabulary=2))
    for x, log_p in zip(STRINGS, LOG_JOINT, strict=True):
        nll = np.asarray(loss(np.tile(x, (7, 1)), masks))
        by_count = [nll[masks.sum(1) == n].mean() / n for n in (1, 2, 3)]
        # Each term of a mask is the mean over the orders that begin there.
        np.testing.assert_allclose(sum(by_count), -log_p, rtol=1e-10)


@pytest.mark.parametrize("by", ["random", "confidence"])
def test_one_token_at_a_time_samples_the_law(by):
    samples = jax.jit(
        lambda key: gd.sample_masked(
            exact_predictor, key, (8192, 3), vocabulary=2, num_steps=3, by=by
        )
    )(jax.random.key(7))
    assert set(np.unique(samples)) == {0, 1}
    fits(np.bincount(np.asarray(samples) @ np.array([4, 2, 1]), minlength=8), np.exp(LOG_JOINT))


def test_all_at_once_samples_the_product_of_the_marginals():
    draw = partial(gd.sample_masked, exact_predictor, shape=(8192, 3), vocabulary=2, num_steps=1)
    samples = jax.jit(draw)(jax.random.key(8))
    marginal = np.exp(LOG_JOINT) @ STRINGS
    chances = np.prod(np.where(STRINGS == 1, marginal[None], 1 - marginal[None]), axis=1)
    fits(np.bincount(np.asarray(samples) @ np.array([4, 2, 1]), minlength=8), chances)


def test_one_step_reveals_with_the_posterior_chance():
    """(alpha_s - alpha_t) / (1 - alpha_t) of each place: independently, or in the mean."""
    ways = ("independent", "random", "confidence")

    @jax.jit
    def run(key, z):
        move = gd.Move(jnp.float32(0.8), jnp.float32(0.5), jnp.square, key, 0, z, jnp.float32(1))
        step = partial(gd.unmask_step, exact_predictor, z, move, vocabulary=2)
        return [step(by=by) for by in ways]

    found = jax.device_get(run(jax.random.key(9), np.tile([1, 2, 2], (4096, 1))))
    for by, (after, estimate) in zip(ways, found, strict=True):
        chance = (0.8**2 - 0.5**2) / 0.8**2
        np.testing.assert_array_equal(after[:, 0], 1)
        assert (estimate < 2).all()
        revealed = np.asarray(after[:, 1:] < 2)
        np.testing.assert_array_equal(after[:, 1:][revealed], estimate[:, 1:][revealed])
        if by != "confidence":
            in_the_mean(revealed.mean(1), chance)
        counts = np.bincount(revealed.sum(1), minlength=3)
        if by == "independent":
            fits(counts, np.array([(1 - chance) ** 2, 2 * chance * (1 - chance), chance**2]))
        else:
            assert counts[0] == 0  # 2 chance = 1.22: one or two


def test_samples_keep_what_is_given_and_depend_on_their_index_alone():
    start = np.tile([2, 1, 2], (6, 1))
    ways = (("random", 3), ("confidence", 2), ("independent", 7))

    @jax.jit
    def run(key, start):
        draw = partial(gd.sample_masked, exact_predictor, key, vocabulary=2)
        found = [
            (
                draw((6, 3), num_steps=steps, by=by, start=start),
                draw((1, 3), num_steps=steps, by=by, start=start[2:3], first_index=2),
            )
            for by, steps in ways
        ]
        return found, draw((4, 3), num_steps=1, temperature=0.0)

    found, cold = jax.device_get(run(jax.random.key(10), start))
    for whole, one in found:
        np.testing.assert_array_equal(whole[:, 1], 1)
        assert (whole < 2).all()
        np.testing.assert_array_equal(one[0], whole[2])
    ones = np.exp(LOG_JOINT) @ STRINGS
    np.testing.assert_array_equal(cold, np.broadcast_to(ones > 0.5, (4, 3)))


def test_bad_input_is_refused_by_name(unchecked):
    key, x = jax.random.key(0), rows(2)
    bound = lambda x=x, network=predict, **o: gd.masked_bound(  # noqa: E731
        network, key, x, **{"vocabulary": V, **o}
    )
    draw = lambda shape=(2, 3), **o: gd.sample_masked(  # noqa: E731
        predict, key, shape, **{"vocabulary": V, "num_steps": 2, **o}
    )
    for call, error, message in (
        (lambda: bound(x + 0.5), TypeError, "x must hold integer tokens"),
        (lambda: bound(x[0]), ValueError, r"x \[batch, time\] must have rank 2"),
        (lambda: bound(x + 1), ValueError, r"x must lie in \[0, 2\]"),
        (lambda: bound(vocabulary=1), ValueError, "vocabulary must be at least 2"),
        (lambda: bound(vocabulary=5), ValueError, "must have 5 columns, or 6"),
        (lambda: bound(network=lambda z: predict(z)[:, :2]), ValueError, "predict returns"),
        (lambda: bound(schedule="linea"), ValueError, "did you mean 'linear'"),
        (lambda: bound(schedule=lambda t: 1 - t), ValueError, "schedule must rise from 0"),
        (lambda: bound(times=jnp.array([0.5, 1.5])), ValueError, r"times must lie in \[0, 1\]"),
        (lambda: bound(times=jnp.ones(3)), ValueError, "times must have shape"),
        (lambda: bound(where=jnp.ones((2, 2), bool)), ValueError, "where must have shape"),
        (lambda: draw((3,)), ValueError, "shape must be"),
        (lambda: draw(by="confident"), ValueError, "did you mean 'confidence'"),
        (lambda: draw(temperature=-1.0), ValueError, "temperature must be at least 0"),
        (lambda: draw(num_steps=0), ValueError, "num_steps must be at least 1"),
        (lambda: draw(start=jnp.full((2, 3), 7)), ValueError, r"start must lie in \[0, 3\]"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "quadratic"])
def test_score_entropy_is_the_masked_bound_near_the_end_in_float32(schedule):
    """1 - m(t) is formed without cancellation: the cosine's m rounds to 1 from t = 1 - 2e-4."""
    times = np.array([0.999, 0.9999, 1 - 1.1e-5])
    alpha = {
        "linear": 1 - times,
        "cosine": 2 * np.sin(0.25 * math.pi * (1 - times)) ** 2,
        "quadratic": (1 - times) * (1 + times),
    }[schedule]
    ratio = jnp.asarray(np.log(alpha / (1 - alpha)) - math.log(V), jnp.float32)

    def log_score(z, t):
        return jnp.broadcast_to(ratio[:, None, None], (*z.shape, V))

    options = {"vocabulary": V, "schedule": schedule, "times": jnp.asarray(times, jnp.float32)}
    x = rows(3)
    even = lambda z: jnp.zeros((*z.shape, V))  # noqa: E731
    expected = gd.masked_bound(even, jax.random.key(1), x, **options)[0]
    found = gd.score_entropy(log_score, jax.random.key(1), x, **options)[0]
    assert np.isfinite(found).all()
    # The time itself is rounded: 1 - t has but few digits.
    np.testing.assert_allclose(found[:2], expected[:2], rtol=2e-3)
