"""How near each objective of alignment comes to the optimum, where every string can be listed.

    max over pi of J = E r - beta KL(pi || ref),    pi* = ref exp(r / beta) / Z,    J* = beta log Z

The policy is a table: the logits of the next token after each prefix of strings of `length` tokens,
all of which are listed, with a random reference and random rewards. Policy gradients draw from the
policy; preference losses get pairs of the reference, of which r prefers one with probability
sigma(r_a - r_b). The table gives the share of the way from J(ref) to J* and KL(pi* || pi).

    python -m experiments.preferences
    python -m experiments.preferences --objectives rloo grpo dpo --beta 0.3 --seeds 8

rloo_k1, k2, k3 put an estimate of the KL into the loss instead of the reward: only k2, of the whole
string, has the right gradient. ipo, hinge, simpo and orpo have other optima than pi*, and f_dpo one
for each divergence. preferences.png shows rewards over KLs, and the curve of what can be reached.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run
from genjax import alignment as ga
from genjax import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Train a policy over strings that can be listed, under each objective."""

    dataset: Literal["strings"] = "strings"
    """Strings, with a random reference and random rewards."""
    objectives: tuple[str, ...] = ()
    """Names in OBJECTIVES (default: all)."""
    vocabulary: int = 4
    """Tokens."""
    length: int = 4
    """Tokens of a string."""
    beta: float = 0.5
    """Price of a nat of KL, in units of the rewards, whose standard deviation is 1."""
    group: int = 8
    """Strings that are compared with each other (rloo, grpo)."""
    batch_size: int = 4096
    """Strings, or pairs of them, in one update."""
    steps: int = 2000
    """Updates."""
    learning_rate: float = 0.1
    """Adam's rate, falling along a cosine to nothing."""
    seeds: int = 4
    """Trainings of each objective, of which mean and standard deviation are reported."""


class Problem(NamedTuple):
    """All strings with what is known of each; the KL's price, and the size of a group."""

    strings: jax.Array  # [strings, length]
    prefixes: jax.Array  # [strings, length]: the row of the policy's table that gives each token
    log_ref: jax.Array  # [strings, length]: log-probabilities of tokens
    rewards: jax.Array  # [strings]
    beta: float
    group: int

    def log_probs(self, policy: jax.Array) -> jax.Array:
        """Log-probabilities [strings, length] of all tokens under a table of logits."""
        return jax.nn.log_softmax(policy)[self.prefixes, self.strings]

    @property
    def sums(self) -> jax.Array:
        return jnp.sum(self.log_ref, axis=1)


def make_problem(config: Config) -> Problem:
    """Every string, the reference and the rewards, from the seed."""
    strings = np.array(list(itertools.product(range(config.vocabulary), repeat=config.length)))
    known: dict[tuple[int, ...], int] = {}
    prefixes = [[known.setdefault((*s[:t],), len(known)) for t in range(len(s))] for s in strings]
    key_ref, key_reward = jax.random.split(jax.random.key(config.seed))
    strings, prefixes = jnp.asarray(strings), jnp.asarray(prefixes)
    reference = jax.random.normal(key_ref, (len(known), config.vocabulary))
    log_ref = jax.nn.log_softmax(reference)[prefixes, strings]
    rewards = jax.random.normal(key_reward, (len(strings),))
    return Problem(strings, prefixes, log_ref, rewards, config.beta, config.group)


# An objective: (problem, params {"policy", "values"}, key, batch size) -> losses [batch]
Objective = Callable[[Problem, Any, jax.Array, int], jax.Array]


def choose(key: jax.Array, log_probs: jax.Array, num: int) -> jax.Array:
    """So many strings of a law: where uniform numbers fall between its cumulative sums."""
    ends = jnp.cumsum(jnp.exp(log_probs))
    return jnp.searchsorted(ends, jax.random.uniform(key, (num,)) * ends[-1], side="right")


def drawn(problem: Problem, params: Any, key: jax.Array, num: int) -> tuple[jax.Array, ...]:
    """Strings of the policy: their numbers, log-probabilities of their tokens, the reference's."""
    table = problem.log_probs(params["policy"])
    index = choose(key, jax.lax.stop_gradient(jnp.sum(table, axis=1)), num)
    return index, table[index], problem.log_ref[index]


def rloo(problem: Problem, params: Any, key: jax.Array, num: int, kl: str = "reward") -> jax.Array:
    """Leave-one-out advantages; the KL in the reward, or an estimate of it in the loss."""
    index, log_p, log_ref = drawn(problem, params, key, num)
    score = problem.rewards[index]
    if kl == "reward":
        score = jnp.sum(ga.kl_rewards(log_p, log_ref, score, beta=problem.beta), axis=1)
    advantages = ga.leave_one_out(score.reshape(-1, problem.group)).ravel()
    if kl == "k2_whole":  # of the whole string, as one token
        log_p, log_ref = (jnp.sum(x, axis=1, keepdims=True) for x in (log_p, log_ref))
    price = {} if kl == "reward" else {"ref": log_ref, "beta": problem.beta, "kl": kl[:2]}
    return ga.policy_loss(log_p, log_p, advantages, **price)[0]


def grpo(problem: Problem, params: Any, key: jax.Array, num: int) -> jax.Array:
    """As published: advantages over their standard deviation, k3 of each token in the loss."""
    index, log_p, log_ref = drawn(problem, params, key, num)
    advantages = ga.group_advantages(problem.rewards[index].reshape(-1, problem.group)).ravel()
    options = {"ref": log_ref, "beta": problem.beta, "kl": "k3", "divisor": "length"}
    return ga.policy_loss(log_p, log_p, advantages, **options)[0]


def ppo(problem: Problem, params: Any, key: jax.Array, num: int) -> jax.Array:
    """Generalised advantages of a table of values; the KL in the reward of each token."""
    index, log_p, log_ref = drawn(problem, params, key, num)
    values = params["values"][problem.prefixes[index]]
    rewards = ga.kl_rewards(log_p, log_ref, problem.rewards[index], beta=problem.beta)
    ends = jnp.arange(log_p.shape[1]) == log_p.shape[1] - 1
    found = ga.gae(rewards, values, jnp.broadcast_to(ends[None], log_p.shape))
    policy, _ = ga.policy_loss(log_p, log_p, found.advantages)
    return policy + 0.5 * ga.value_loss(values, found.returns)[0]


def pairs(problem: Problem, params: Any, key: jax.Array, num: int) -> list[jax.Array]:
    """Token log-probabilities of pairs of the reference, the preferred string first."""
    key_pair, key_choice = jax.random.split(key)
    a, b = choose(key_pair, problem.sums, 2 * num).reshape(2, num)
    chance = jax.nn.sigmoid(problem.rewards[a] - problem.rewards[b])
    first = jax.random.uniform(key_choice, (num,)) < chance
    chosen, rejected = jnp.where(first, a, b), jnp.where(first, b, a)
    tables = problem.log_probs(params["policy"]), problem.log_ref
    return [table[side] for table in tables for side in (chosen, rejected)]


def preference(loss: Callable[..., Any], *, reference: bool = True, **options: Any) -> Objective:
    """An objective of pairs."""

    def objective(problem: Problem, params: Any, key: jax.Array, num: int) -> jax.Array:
        given = pairs(problem, params, key, num)[: 4 if reference else 2]
        price = {"beta": problem.beta} if reference else {}
        return loss(*given, **price, **options)[0]

    return objective


def kto(problem: Problem, params: Any, key: jax.Array, num: int) -> jax.Array:
    """The preferred string of each pair is desirable, the other is not."""
    chosen, rejected, ref_chosen, ref_rejected = pairs(problem, params, key, num)
    ratios = [jnp.sum(a - b, axis=1) for a, b in ((chosen, ref_chosen), (rejected, ref_rejected))]
    ratios, desirable = jnp.concatenate(ratios), jnp.arange(2 * num) < num
    point = ga.kto_reference_point(ratios)  # there is one prompt: every string is of another's
    losses, _ = ga.kto(ratios, desirable, point, beta=problem.beta)
    return losses[:num] + losses[num:]


OBJECTIVES: dict[str, Objective] = {
    "rloo": rloo,
    "rloo_k2_whole": partial(rloo, kl="k2_whole"),
    "rloo_k2": partial(rloo, kl="k2"),
    "rloo_k3": partial(rloo, kl="k3"),
    "rloo_k1": partial(rloo, kl="k1"),
    "grpo": grpo,
    "ppo": ppo,
    "dpo": preference(ga.dpo),
    "cdpo": preference(ga.dpo, label_smoothing=0.1),
    "f_dpo_jeffreys": preference(partial(ga.f_dpo, "jeffreys")),
    "f_dpo_jensen_shannon": preference(partial(ga.f_dpo, "jensen_shannon")),
    "f_dpo_reverse_kl": preference(partial(ga.f_dpo, "reverse_kl")),
    "ipo": preference(ga.ipo),
    "hinge": preference(ga.hinge),
    "kto": kto,
    "simpo": preference(ga.simpo, reference=False),
    "orpo": preference(ga.orpo, reference=False),
}


def main(config: Config) -> dict[str, Any]:
    """Train under each objective and compare with the optimum; returns the summary."""
    names = config.objectives or tuple(OBJECTIVES)
    for name in names:
        checks.one_of("objectives", name, OBJECTIVES)
    for name in ("vocabulary", "group", "seeds"):
        checks.integer(name, getattr(config, name), 1 if name == "seeds" else 2)
    checks.integer("length", config.length, 1)
    if config.batch_size % config.group:
        raise ValueError(f"batch_size must be a multiple of group, got {config.batch_size}")
    problem = make_problem(config)
    log_best, best = ga.optimal_policy(problem.sums, problem.rewards, beta=config.beta)
    summary: dict[str, Any] = {"optimum": float(best)}
    with _run.start_run(config) as run:
        for name in names:
            policies = fit(config, problem, OBJECTIVES[name])
            found = jax.vmap(partial(measure, problem, log_best, best))(policies)
            summary[name] = {k: float(np.mean(v)) for k, v in found.items()}
            summary[name] |= {f"{k}_spread": float(np.std(v)) for k, v in found.items()}
            row = summary[name]
            print(
                f"{name:22} {row['share']:7.1%} of the way, KL from the optimum {row['miss']:.3f}"
            )
        plot(run, problem, {name: summary[name] for name in names})
        return _run.finish(run, summary)


def fit(config: Config, problem: Problem, objective: Objective) -> jax.Array:
    """The tables [seeds, prefixes, vocabulary] that so many trainings end with, in one program."""
    num = int(problem.prefixes.max()) + 1
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    table = jnp.zeros((num, config.vocabulary))
    # Training begins at the reference: a token's log-probability is a logit of it.
    table = table.at[problem.prefixes, problem.strings].set(problem.log_ref)

    def run(key: jax.Array) -> jax.Array:
        params = {"policy": table, "values": jnp.zeros(num)}

        def step(state: Any, number: jax.Array) -> tuple[Any, None]:
            params, moments = state
            now = jax.random.fold_in(key, number)
            loss = lambda p: jnp.mean(objective(problem, p, now, config.batch_size))  # noqa: E731
            updates, moments = optimizer.update(jax.grad(loss)(params), moments)
            return (optax.apply_updates(params, updates), moments), None

        start = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(step, start, jnp.arange(config.steps))
        return params["policy"]

    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(config.seed + 1), config.seeds))


def measure(problem: Problem, log_best: jax.Array, best: Any, policy: jax.Array) -> dict[str, Any]:
    """Reward, KL to the reference, share of the way to the optimum, KL from the optimum."""
    log_p = jnp.sum(problem.log_probs(policy), axis=1)
    reward = jnp.sum(jnp.exp(log_p) * problem.rewards)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - problem.sums))
    before = jnp.sum(jnp.exp(problem.sums) * problem.rewards)
    share = (reward - problem.beta * kl - before) / (best - before)
    miss = jnp.sum(jnp.exp(log_best) * (log_best - log_p))
    return {"reward": reward, "kl": kl, "share": share, "miss": miss}


def plot(run: Any, problem: Problem, found: dict[str, Any]) -> None:
    """Rewards over KLs, and the curve of the optima of all prices."""
    curve = []
    for beta in np.geomspace(0.05, 20, 60):
        log_p, value = ga.optimal_policy(problem.sums, problem.rewards, beta=float(beta))
        reward = float(jnp.sum(jnp.exp(log_p) * problem.rewards))
        curve.append(((reward - float(value)) / beta, reward))

    def draw(axes: Any) -> None:
        axes[0].plot(*np.array(curve).T, color="black", label="optima")
        for i, (name, row) in enumerate(found.items()):
            marker = "o^sDvPX*"[i % 8]
            axes[0].plot(row["kl"], row["reward"], marker, linestyle="", label=name)
        axes[0].set(xlabel="KL to the reference, nats", ylabel="mean reward")
        axes[0].legend(fontsize=6)

    title = "reward against KL, of objectives and the optimum"
    _pictures.save_figure(run.folder / "preferences.png", draw, title=title, size=5.0)


if __name__ == "__main__":
    _run.launch(main, Config)
