"""A small GPT that learns additions from answers of which most are wrong, then from rewards.

First it imitates: of the answers that it reads only the share `right` is right, and it comes to
answer so. Then it draws `group` answers to each prompt and is rewarded for right ones, while a nat
of KL to its imitating self, the reference, costs `beta`:

    max over pi of E r - beta KL(pi || ref)

    python -m experiments.rlhf
    python -m experiments.rlhf --algorithm ppo
    python -m experiments.rlhf --reward model --beta 0.02

rloo has the KL in the reward, grpo (as published) k3 of each token in the loss, ppo a network of
values and generalised advantages. reward="model" hides the truth: a Bradley-Terry model, trained on
pairs of answers while the policy imitates, judges instead. Answers are drawn inside the compiled
step by a copy of the policy that is renewed every `lag` steps, so that a batch stays a function of
(seed, step); copy and reference are the state's carry. Digits of an answer come in the order units,
tens, hundreds. The additions of the test are never trained on. rlhf.png shows both phases.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run, _system
from experiments._data import Data
from experiments._system import System, train
from genjax import alignment as ga
from genjax import checks
from genjax.autoregressive import generate, next_token
from genjax.data import DataSpec
from genjax.networks import GPT
from genjax.training.record import read_metrics

PLUS, EQUALS, VOCABULARY = 10, 11, 12
PROMPT, ANSWER = 6, 3  # "ab+cd=" and three digits
LARGEST = 99 + 99


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Teach additions by imitation, then by rewards."""

    dataset: Literal["additions"] = "additions"
    """All sums of two numbers from 0 to 99."""
    algorithm: Literal["rloo", "grpo", "ppo"] = "rloo"
    """How rewards become a gradient."""
    reward: Literal["right", "model"] = "right"
    """1 for a right answer, or what a Bradley-Terry model of pairs says."""
    right: float = 0.4
    """Share of right answers among those that are imitated."""
    beta: float = 0.05
    """Price of a nat of KL to the reference, in units of the reward."""
    group: int = 8
    """Answers to one prompt."""
    lag: int = 2
    """Steps between two copies of the policy to the one that draws the answers."""
    imitation: int = 3000
    """Steps of imitation; those after them, up to `steps`, are of rewards."""
    steps: int = 3500
    depth: int = 2
    """Blocks of each network."""
    width: int = 64
    """Features of a token."""
    heads: int = 4
    """Heads of the attention."""
    learning_rate: float = 3e-3
    """AdamW's rate of imitation, falling along a cosine to a tenth."""
    reward_rate: float = 1e-3
    """AdamW's rate of rewards, falling along a cosine to nothing."""
    ema: float = 0.95
    batch_size: int = 256
    steps_per_call: int = 20


def main(config: Config) -> dict[str, Any]:
    """Train both phases, measure on the additions held out; returns the summary."""
    data = load_data(config)
    return train(config, build(config, data), data, partial(report, config))


def load_data(config: Config) -> Data:
    """Prompts of all 10,000 additions in an order of the seed; a tenth of them is the test."""
    a, b = np.divmod(np.random.default_rng(config.seed).permutation(10_000), 100)
    digits = [a // 10, a % 10, np.full_like(a, PLUS), b // 10, b % 10, np.full_like(a, EQUALS)]
    prompts = np.stack(digits, axis=1).astype(np.int32)
    spec = DataSpec("additions", "tokens", (PROMPT,), VOCABULARY, None)
    return Data({"x": prompts[1000:]}, {"x": prompts[:1000]}, spec)


def sums(prompts: jax.Array) -> jax.Array:
    """What the additions of prompts [n, 6] come to."""
    return 10 * (prompts[:, 0] + prompts[:, 3]) + prompts[:, 1] + prompts[:, 4]


def spelled(numbers: jax.Array) -> jax.Array:
    """Numbers [n] as answers [n, 3]: units, tens, hundreds."""
    return jnp.stack([numbers // 10**i % 10 for i in range(ANSWER)], axis=1)


def wrong(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """Another number from 0 to 198 in the place of each."""
    by = jax.random.randint(key, numbers.shape, 1, LARGEST + 1)
    return (numbers + by) % (LARGEST + 1)


def texts(config: Config, samples: np.ndarray) -> list[str]:
    """Prompts with answers [n, 9] as one reads them: "12+34=046"."""
    rows = np.concatenate([samples[:, :PROMPT], samples[:, : PROMPT - 1 : -1]], axis=1)
    return ["".join("0123456789+="[token] for token in row) for row in rows]


def is_right(tokens: jax.Array) -> jax.Array:
    """1 where the answer of prompt and answer [n, 9] is right, else 0."""
    same = tokens[:, PROMPT:] == spelled(sums(tokens[:, :PROMPT]))
    return jnp.all(same, axis=1).astype(jnp.float32)


class Networks:
    """Policy, values and judge: three transformers of one size, as functions of parameters."""

    def __init__(self, config: Config):
        self.config = config
        sizes = {"max_length": PROMPT + ANSWER + 1, "remat": config.remat}
        self.gpt = GPT(VOCABULARY, config.depth, config.width, config.heads, **sizes)
        self.names = ["policy"]
        self.names += ["values"] if config.algorithm == "ppo" else []
        self.names += ["judge"] if config.reward == "model" else []

    def init(self, key: jax.Array) -> Any:
        keys = jax.random.split(key, len(self.names))
        tokens = jnp.zeros((1, PROMPT + ANSWER + 1), jnp.int32)
        return {name: self.gpt.init(k, tokens) for name, k in zip(self.names, keys, strict=True)}

    def log_probs(self, policy: Any, tokens: jax.Array) -> jax.Array:
        """Log-probabilities [n, 3] of the tokens of the answers."""
        logits = self.gpt.apply(policy, tokens)[:, PROMPT:]
        return ga.token_log_probs(logits, tokens[:, PROMPT:])

    def values(self, params: Any, tokens: jax.Array) -> jax.Array:
        """What is expected before each token of the answers, [n, 3]."""
        return self.gpt.apply(params["values"], tokens)[:, PROMPT:, 0]

    def score(self, params: Any, tokens: jax.Array) -> jax.Array:
        """What the judge says of prompts with answers, [n]: at the place after the last token."""
        longer = jnp.pad(tokens, ((0, 0), (0, 1)))
        return self.gpt.apply(params["judge"], longer)[:, -1, 0]

    def answer(self, policy: Any, key: jax.Array, prompts: jax.Array) -> jax.Array:
        """Prompts with answers drawn from the policy, [n, 9]."""
        cache = self.gpt.apply(policy, len(prompts), PROMPT + ANSWER, method="empty_cache")
        step = partial(self.gpt.apply, self.gpt.unstacked(policy), method="step")
        drawn = generate(step, cache, key, prompts, num_tokens=ANSWER)
        return jnp.concatenate([prompts, drawn.tokens], axis=1)


def build(config: Config, data: Data) -> System:
    """The networks with the loss of both phases."""
    for name, least in (("group", 2), ("lag", 1), ("imitation", 1)):
        checks.integer(name, getattr(config, name), least)
    checks.positive("beta", config.beta)
    checks.between("right", config.right, 0, 1)
    if config.steps <= config.imitation:
        raise ValueError(
            f"steps must be above those of imitation, {config.imitation}, got {config.steps}"
        )
    part = config.batch_size // config.accumulate
    if part % config.group:
        raise ValueError(
            f"batch_size / accumulate must be a multiple of group = {config.group}, got {part}"
        )
    networks = Networks(config)

    def loss(params: Any, key: jax.Array, batch: Any, carry: Any) -> tuple:
        phases = partial(imitate, config, networks), partial(reinforce, config, networks)
        given = params, key, batch["x"].astype(jnp.int32), carry
        losses, aux = jax.lax.cond(carry["number"] < config.imitation, *phases, *given)
        return losses, aux, {}

    def absorb(carry: Any, params: Any, seen: Any) -> Any:
        number = carry["number"] + 1
        renewed = {"reference": number == config.imitation, "sampler": number % config.lag == 0}
        copies = {
            name: jax.tree.map(partial(jnp.where, now), params["policy"], carry[name])
            for name, now in renewed.items()
        }
        return {"number": number, **copies}

    def init_carry(key: jax.Array, params: Any) -> Any:
        policy = params["policy"]
        return {"number": jnp.zeros((), jnp.int32), "reference": policy, "sampler": policy}

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        prompts = jnp.asarray(np.resize(data.test["x"], (n, PROMPT)))
        return networks.answer(params["policy"], key, prompts)

    rewards = max(config.steps - config.imitation, 1)
    rate = optax.join_schedules(
        [
            optax.warmup_cosine_decay_schedule(
                0.0, config.learning_rate, min(100, config.imitation // 4), config.imitation,
                0.1 * config.learning_rate,
            ),
            optax.cosine_decay_schedule(config.reward_rate, rewards),
        ],
        [config.imitation],
    )  # fmt: skip
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99))
    return System(
        networks.init,
        loss,
        optimizer,
        sample,
        count=len(data.test["x"]),
        evaluations=PROMPT + ANSWER,
        init_carry=init_carry,
        absorb=absorb,
        merge_carry=lambda params, carry: {**params, "reference": carry["reference"]},
        remat=True,
    )


def imitate(
    config: Config, networks: Networks, params: Any, key: jax.Array, prompts: jax.Array, carry: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of answers that are mostly wrong; of the judge, the loss of its pairs."""
    key_wrong, key_right, key_pair = jax.random.split(key, 3)
    truth = sums(prompts)
    kept = jax.random.uniform(key_right, truth.shape) < config.right
    answers = spelled(jnp.where(kept, truth, wrong(key_wrong, truth)))
    tokens = jnp.concatenate([prompts, answers], axis=1)
    where = jnp.broadcast_to(jnp.arange(PROMPT + ANSWER)[None] >= PROMPT, tokens.shape)
    losses, _ = next_token(partial(networks.gpt.apply, params["policy"]), tokens, where=where)
    if config.reward == "model":
        pair = [
            jnp.concatenate([prompts, spelled(numbers)], axis=1)
            for numbers in (truth, wrong(key_pair, truth))
        ]
        scores = networks.score(params, jnp.concatenate(pair))
        losses = losses + ga.bradley_terry(*jnp.split(scores, 2))[0]
    nothing = jnp.zeros_like(losses)
    return losses, {"right": kept.astype(losses.dtype), "kl": nothing, "reward": nothing}


def reinforce(
    config: Config, networks: Networks, params: Any, key: jax.Array, prompts: jax.Array, carry: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The policy's loss on answers that its last copy has drawn, `group` to a prompt."""
    groups = len(prompts) // config.group
    prompts = jnp.repeat(prompts[:groups], config.group, axis=0)
    tokens = networks.answer(carry["sampler"], key, prompts)
    right = is_right(tokens)
    score = right
    if config.reward == "model":
        score = jax.lax.stop_gradient(networks.score(params, tokens))
    log_p, old, log_ref = (
        networks.log_probs(policy, tokens)
        for policy in (params["policy"], carry["sampler"], carry["reference"])
    )
    rewards = ga.kl_rewards(old, log_ref, score, beta=config.beta)
    if config.algorithm == "ppo":
        values = networks.values(params, tokens)
        ends = jnp.broadcast_to(jnp.arange(ANSWER)[None] == ANSWER - 1, values.shape)
        found = ga.gae(rewards, values, ends)
        losses, _ = ga.policy_loss(log_p, old, ga.whiten(found.advantages))
        losses = losses + 0.5 * ga.value_loss(values, found.returns)[0]
    elif config.algorithm == "grpo":
        advantages = ga.group_advantages(score.reshape(groups, config.group)).ravel()
        price = {"ref": log_ref, "beta": config.beta, "divisor": "length"}
        losses, _ = ga.policy_loss(log_p, old, advantages, **price)
    else:
        whole = jnp.sum(rewards, axis=1).reshape(groups, config.group)
        losses, _ = ga.policy_loss(log_p, old, ga.leave_one_out(whole).ravel())
    kl = jax.lax.stop_gradient(jnp.sum(ga.kl_estimate(log_p, log_ref), axis=1))
    return losses, {"right": right, "kl": kl, "reward": score}


def report(config: Config, run: _run.Run, params: Any, samples: np.ndarray) -> dict[str, Any]:
    """Share of right answers to the additions held out, before and after; the KL between."""
    networks, key = Networks(config), _system.keys(config.seed).test
    prompts = jnp.asarray(samples[:, :PROMPT])

    @jax.jit
    def found(params: Any) -> dict[str, jax.Array]:
        before = networks.answer(params["reference"], key, prompts)
        policies = params["policy"], params["reference"]
        log_p, log_ref = (networks.log_probs(policy, jnp.asarray(samples)) for policy in policies)
        kl = jnp.sum(ga.kl_estimate(log_p, log_ref, "k1"), axis=1)
        judged = networks.score(params, jnp.asarray(samples)) if "judge" in params else None
        return {
            "right_before": jnp.mean(is_right(before)),
            "right": jnp.mean(is_right(jnp.asarray(samples))),
            "kl": jnp.mean(kl),
            **({} if judged is None else {"judged": jnp.mean(judged)}),
        }

    rows = read_metrics(run.folder / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    curves = {name: (steps, [row[name] for row in rows]) for name in ("right", "kl")}
    _pictures.save_curves(
        run.folder / "rlhf.png", curves, title="share of right answers, KL in nats"
    )
    return {name: float(value) for name, value in found(params).items()}


if __name__ == "__main__":
    _run.launch(main, Config)
