"""Selection and beams beside recorded numbers and enumeration; draws in law and by row."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.autoregressive import beam_search, generate, recomputing_step, select

FIXTURE = json.loads(
    (Path(__file__).parents[1] / "references" / "token_selection_and_beam.json").read_text()
)
GIVEN, EXPECTED = FIXTURE["inputs"], FIXTURE["expected"]
FIRST = np.asarray(GIVEN["first_log_probs"])
NEXT = np.asarray(GIVEN["transition_log_probs"])
KEY = jax.random.key(0)
# A law of strings over 3 letters: the next one depends on the last two and on the position.
TABLE = jax.random.normal(jax.random.key(3), (8, 4, 4, 3))


def markov(cache, token, position):
    """A Markov chain as a step: the cache is nothing but a count of the calls."""
    table = jnp.concatenate([jnp.asarray(NEXT), jnp.asarray(FIRST)[None]])
    return table[token], cache + 1


def logits_fn(tokens):
    """The law of TABLE for whole sequences [B, T]; 3 stands for what is before the first."""
    before = jnp.pad(tokens, ((0, 0), (2, 0)), constant_values=3)
    places = jnp.arange(tokens.shape[1])[None]
    return TABLE[places, before[:, :-2], before[:, 1:-1]]


def test_selection_meets_the_reference(x64, compiled):
    logits = jnp.asarray(GIVEN["logits"])
    for case in EXPECTED["selection"]:
        found = compiled(functools.partial(select, **case["options"]))(logits)
        np.testing.assert_allclose(jnp.exp(found), case["probabilities"], rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(found > -jnp.inf, case["kept"])
    greedy = select(logits, temperature=0)
    np.testing.assert_array_equal(jnp.argmax(greedy, -1), EXPECTED["greedy_tokens"])
    np.testing.assert_array_equal(jnp.exp(greedy).sum(-1), 1)


def test_ties_go_by_index_and_options_stay_in_range(unchecked):
    even = jnp.zeros((1, 4))
    kept = lambda **options: np.flatnonzero(select(even, **options)[0] > -jnp.inf)  # noqa: E731
    np.testing.assert_array_equal(kept(top_k=2), [0, 1])
    np.testing.assert_array_equal(kept(top_p=0.5), [0, 1])
    np.testing.assert_array_equal(kept(top_p=0.0), [0])
    np.testing.assert_array_equal(kept(temperature=0), [0])
    np.testing.assert_array_equal(kept(min_p=1.0), [0, 1, 2, 3])
    for options in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 1.1}, {"min_p": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
            select(even, **options)


def test_beam_meets_the_reference(x64):
    """The chain's best string, which the greedy one is not; live beams after each step."""
    options = {"stop": GIVEN["eos"], "alpha": GIVEN["alpha"]}
    prompt = jnp.zeros((1, 0), jnp.int32)

    @functools.partial(jax.jit, static_argnames=("width", "num_tokens"))
    def search(width, num_tokens):
        return beam_search(
            markov, jnp.zeros(1), prompt, width=width, num_tokens=num_tokens, **options
        )

    found = search(GIVEN["beam_width"], GIVEN["steps"])
    np.testing.assert_array_equal(found.tokens[0, 0], EXPECTED["beam"]["tokens"])
    np.testing.assert_allclose(found.log_probs[0, 0], EXPECTED["beam"]["log_prob"], rtol=1e-10)
    np.testing.assert_allclose(
        found.scores[0, 0], EXPECTED["beam"]["log_prob"] / 1.5 ** GIVEN["alpha"], rtol=1e-10
    )
    np.testing.assert_array_equal(search(1, 4).tokens[0, 0], EXPECTED["greedy"]["tokens"])
    # As wide as there are strings it is exhaustive.
    wide = search(121, 4)
    np.testing.assert_array_equal(wide.tokens[0, 0], EXPECTED["exhaustive"]["tokens"])
    strings, log_probs = ended_strings()
    assert len(strings) == 121
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1)
    lengths = np.asarray([len(s) for s in strings])
    best = np.sort(log_probs / ((5 + lengths) / 6) ** GIVEN["alpha"])[::-1]
    np.testing.assert_allclose(wide.scores[0], best, rtol=1e-10)


def ended_strings():
    """All strings of the chain that end with the stop token, or are four tokens long."""
    strings, log_probs = [], []
    for n in range(1, 5):
        for string in itertools.product(range(4), repeat=n):
            if 0 in string[:-1] or (n < 4 and string[-1] != 0):
                continue
            pairs = itertools.pairwise(string)
            strings.append(string)
            log_probs.append(FIRST[string[0]] + sum(NEXT[a, b] for a, b in pairs))
    return strings, np.asarray(log_probs)


def test_beams_of_rows_after_prompts_are_exhaustive_too():
    """A network whose cache must follow its beam, two prompts, no stop token."""
    prompt = jnp.array([[0, 2], [1, 1]])
    step = recomputing_step(logits_fn)
    run = jax.jit(
        lambda: beam_search(step, jnp.zeros((2, 5), jnp.int32), prompt, num_tokens=3, width=27)
    )
    found = run()
    strings = np.asarray(list(itertools.product(range(3), repeat=3)))
    for row in range(2):
        whole = np.concatenate([np.repeat(prompt[row][None], 27, 0), strings], 1)
        log_probs = jax.nn.log_softmax(logits_fn(jnp.asarray(whole)))
        chosen = np.take_along_axis(np.asarray(log_probs), whole[..., None], -1)[:, 2:, 0].sum(1)
        order = np.argsort(-chosen)
        np.testing.assert_array_equal(found.tokens[row], strings[order])
        np.testing.assert_allclose(found.log_probs[row], chosen[order], rtol=1e-5)


@pytest.fixture(scope="module")
def drawn():
    """4,096 strings after one prompt, with their log-probabilities."""
    prompt, cache = jnp.full((4096, 1), 2), jnp.zeros((4096, 4), jnp.int32)
    step = recomputing_step(logits_fn)
    return jax.jit(lambda: generate(step, cache, KEY, prompt, num_tokens=3))()


def test_draws_in_law(drawn):
    """The shares of the 27 strings are their probabilities; log-probabilities are the model's."""
    whole = np.concatenate([np.full((4096, 1), 2), drawn.tokens], 1)
    log_probs = jax.nn.log_softmax(logits_fn(jnp.asarray(whole)))
    chosen = np.take_along_axis(np.asarray(log_probs), whole[..., None], -1)[:, 1:, 0]
    np.testing.assert_allclose(drawn.log_probs, chosen, rtol=1e-5, atol=1e-6)
    number = np.asarray(drawn.tokens) @ [9, 3, 1]
    counts = np.bincount(number, minlength=27)
    expected = np.zeros(27)
    expected[number] = 4096 * np.exp(chosen.sum(1))
    seen = counts > 0
    # Chi-squared of at most 26 degrees: its mean and five standard deviations.
    rest = 4096 - expected[seen].sum()
    assert rest < 100
    statistic = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    assert statistic < 26 + 5 * np.sqrt(52)
    assert bool(drawn.mask.all())


def test_rows_do_not_depend_on_others_nor_on_padding(drawn):
    """Row i in a batch of 3, with prompts padded on either side; chunks by first_index."""
    step = recomputing_step(logits_fn)
    prompt = jnp.array([[2, 0, 0], [0, 2, 1], [1, 1, 2]])
    own = jnp.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)

    @jax.jit
    def run(prompt, own, first):
        cache = jnp.zeros((len(prompt), 6), jnp.int32)
        return generate(step, cache, KEY, prompt, num_tokens=3, where_prompt=own, first_index=first)

    found = run(prompt, own, 0)
    np.testing.assert_array_equal(found.tokens, drawn.tokens[:3])
    np.testing.assert_allclose(found.log_probs, drawn.log_probs[:3], rtol=1e-5)
    np.testing.assert_array_equal(run(prompt[1:], own[1:], 1).tokens, drawn.tokens[1:3])


def test_selection_and_the_stop_token():
    """Greedy draws are the greedy strings; after the stop token there is padding."""
    table = jnp.log(jnp.array([[0.1, 0.7, 0.2], [0.1, 0.2, 0.7], [0.6, 0.1, 0.3], [0.8, 0.1, 0.1]]))
    step = lambda cache, token, position: (table[token], cache)  # noqa: E731
    run = lambda **options: generate(  # noqa: E731
        step,
        None,
        KEY,
        jnp.array([[0], [2]]),
        num_tokens=4,
        select=functools.partial(select, temperature=0),
        **options,
    )
    np.testing.assert_array_equal(run().tokens, [[1, 2, 0, 1], [0, 1, 2, 0]])
    found = run(stop=2, pad=9)
    np.testing.assert_array_equal(found.tokens, [[1, 2, 9, 9], [0, 1, 2, 9]])
    np.testing.assert_array_equal(found.mask, found.tokens != 9)
    np.testing.assert_allclose(found.log_probs[0], [np.log(0.7), np.log(0.7), 0, 0], rtol=1e-6)


def test_bad_input(unchecked):
    step, prompt = recomputing_step(logits_fn), jnp.array([[0, 1]])
    cache = jnp.zeros((1, 4), jnp.int32)
    for search in (functools.partial(generate, key=KEY), beam_search):
        call = functools.partial(search, step=step, cache=cache, prompt=prompt)
        with pytest.raises(ValueError, match=r"position must lie in \[0, 3\], got \[4\]"):
            call(num_tokens=3)
        with pytest.raises(ValueError, match=r"prompt must lie in \[0, 2\]"):
            call(num_tokens=1, prompt=prompt.at[0, 0].set(3))
        with pytest.raises(ValueError, match=r"stop must lie in \[0, 2\], got 3"):
            call(num_tokens=1, stop=3)
        with pytest.raises(ValueError, match="num_tokens must be at least 1"):
            call(num_tokens=0)
        with pytest.raises(ValueError, match="prompt must have rank 2"):
            call(num_tokens=1, prompt=prompt[0])
    with pytest.raises(ValueError, match="width must be at least 1"):
        beam_search(step, cache, prompt, num_tokens=1, width=0)
    with pytest.raises(ValueError, match="shapes must be equal"):
        generate(step, cache, KEY, prompt, num_tokens=1, where_prompt=jnp.ones((1, 3), bool))


def test_the_smallest_temperature_and_prompts_of_numbers(unchecked):
    """A temperature that overflows the logits is greedy; a prompt is of whole tokens."""
    found = jnp.exp(select(jnp.array([1.0, 5.0, -jnp.inf, 2.0]), temperature=2e-38))
    np.testing.assert_array_equal(found, [0, 1, 0, 0])
    step = recomputing_step(lambda tokens: jnp.zeros((*tokens.shape, 4)))
    with pytest.raises(TypeError, match="prompt must be integers"):
        generate(step, jnp.zeros((1, 6), jnp.int32), KEY, jnp.array([[1.7]]), num_tokens=2)
