"""Time of alignment's losses beside their usual PyTorch forms.

    dpo    2 pairs of 256 tokens, 32,000 logits each: DPO and its gradient for the policy's logits
      torch  logits gathered, log sum exp row by row (trl's selective_log_softmax)
    gae    advantages of 2,048 steps of 64 environments
      torch  a Python loop over the steps, as cleanrl has it
    ppo    one minibatch of 256: actor and critic of 2 x 64 tanh, clipped losses, entropy, Adam
      torch  the same, eager

`difference` is relative, of the loss or of the largest advantage.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks._workload import OURS, Options, Row, Side, compare, every, launch
from genjax import alignment as ga
from genjax.networks import MLP

TARGETS = {"dpo": 1.2, "gae": 100.0, "ppo": 3.0}
Makers = dict[str, Callable[[], Side]]


@dataclasses.dataclass(frozen=True)
class Config(Options):
    vocabulary: int = 32_000  # logits of a token (dpo)
    steps: int = 2048  # of an environment (gae)
    batch_size: int = 256  # of the minibatch (ppo)


def dpo(config: Config) -> tuple[Makers, str, dict[str, Any]]:
    rng, shape = np.random.default_rng(0), (4, 256)  # chosen, chosen, rejected, rejected
    logits = rng.normal(size=(*shape, config.vocabulary)).astype(np.float32)
    tokens = rng.integers(0, config.vocabulary, shape)
    reference = (-10 + 0.1 * rng.normal(size=shape)).astype(np.float32)

    def ours() -> Side:
        def loss(logits: jax.Array, tokens: jax.Array, reference: jax.Array) -> jax.Array:
            log_p = ga.token_log_probs(logits, tokens)
            return jnp.mean(ga.dpo(log_p[:2], log_p[2:], reference[:2], reference[2:])[0])

        compiled, given = jax.jit(jax.value_and_grad(loss)), map(jnp.asarray, (logits, tokens))
        given = *given, jnp.asarray(reference)
        return lambda: float(jax.block_until_ready(compiled(*given))[0])

    def theirs() -> Side:
        import torch
        from torch.nn import functional

        x = torch.from_numpy(logits).requires_grad_()
        index, ref = torch.from_numpy(tokens)[..., None], torch.from_numpy(reference).sum(1)

        def run() -> float:
            x.grad = None
            chosen = torch.gather(x, -1, index)[..., 0]
            log_p = (chosen - torch.stack([torch.logsumexp(row, -1) for row in x])).sum(1)
            margin = (log_p[:2] - ref[:2]) - (log_p[2:] - ref[2:])
            loss = -functional.logsigmoid(0.1 * margin).mean()
            loss.backward()
            return float(loss)

        return run

    work = {"bytes": 4.0 * 4 * logits.size}  # read twice, the gradient written, the sum of exp
    return {OURS: ours, "torch": theirs}, f"4x256x{config.vocabulary}", work


def gae(config: Config) -> tuple[Makers, str, dict[str, Any]]:
    rng, num = np.random.default_rng(0), 64
    rewards, values = rng.normal(size=(2, num, config.steps)).astype(np.float32)
    dones = (rng.random((num, config.steps)) < 0.01).astype(np.float32)
    last = rng.normal(size=num).astype(np.float32)

    def ours() -> Side:
        compiled = jax.jit(
            lambda *x, last: ga.gae(*x, bootstrap=last, discount=0.99, decay=0.95).advantages
        )
        given = [jnp.asarray(x) for x in (rewards, values, dones)]
        return lambda: jax.block_until_ready(compiled(*given, last=jnp.asarray(last)))

    def theirs() -> Side:
        import torch

        r, v, d = (torch.from_numpy(x.T.copy()) for x in (rewards, values, dones))
        following = torch.cat([v[1:], torch.from_numpy(last)[None]])

        def run() -> Any:
            advantages, advantage = torch.zeros_like(r), torch.zeros(num)
            for t in reversed(range(config.steps)):
                going = 1 - d[t]
                delta = r[t] + 0.99 * following[t] * going - v[t]
                advantage = delta + 0.99 * 0.95 * going * advantage
                advantages[t] = advantage
            return advantages.numpy().T

        return run

    return {OURS: ours, "torch": theirs}, f"{config.steps}x{num}", {"bytes": 16.0 * rewards.size}


def ppo(config: Config) -> tuple[Makers, str, dict[str, Any]]:
    rng, n, dims, actions = np.random.default_rng(0), config.batch_size, 4, 2
    x = rng.normal(size=(n, dims)).astype(np.float32)
    action = rng.integers(0, actions, n)
    old = np.log(rng.uniform(0.4, 0.6, n)).astype(np.float32)
    advantages, returns = rng.normal(size=(2, n)).astype(np.float32)

    def ours() -> Side:
        actor, critic = (MLP((64, 64, size), activation=nn.tanh) for size in (actions, 1))
        params = [m.init(jax.random.key(i), x) for i, m in enumerate((actor, critic))]
        optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(2.5e-4))

        @jax.jit
        def step(params: Any, moments: Any) -> Any:
            def loss(params: Any) -> jax.Array:
                logits = actor.apply(params[0], x)[:, None]  # one token a row
                log_p = ga.token_log_probs(logits, action[:, None])
                normal = ga.whiten(jnp.asarray(advantages)[:, None])
                policy, _ = ga.policy_loss(log_p, jnp.asarray(old)[:, None], normal)
                values, _ = ga.value_loss(critic.apply(params[1], x), returns[:, None])
                bonus = ga.token_entropy(logits)
                return jnp.mean(policy) + 0.25 * jnp.mean(values) - 0.01 * jnp.mean(bonus)

            value, gradient = jax.value_and_grad(loss)(params)
            updates, moments = optimizer.update(gradient, moments)
            return optax.apply_updates(params, updates), moments, value

        state = params, optimizer.init(params)

        def run() -> float:
            nonlocal state
            *state, value = step(*state)
            return float(value)

        return run

    def theirs() -> Side:
        import torch
        from torch import nn as tnn

        net = lambda size: tnn.Sequential(  # noqa: E731
            tnn.Linear(dims, 64), tnn.Tanh(), tnn.Linear(64, 64), tnn.Tanh(), tnn.Linear(64, size)
        )
        actor, critic = net(actions), net(1)
        weights = [*actor.parameters(), *critic.parameters()]
        optimizer = torch.optim.Adam(weights, lr=2.5e-4, eps=1e-8)
        given = (torch.from_numpy(v) for v in (x, action, old, advantages, returns))
        tx, chosen, before, raw, target = given

        def run() -> float:
            law = torch.distributions.Categorical(logits=actor(tx))
            ratio = (law.log_prob(chosen) - before).exp()
            normal = (raw - raw.mean()) / (raw.std() + 1e-8)
            policy = torch.max(-normal * ratio, -normal * ratio.clamp(0.8, 1.2)).mean()
            value = 0.5 * (critic(tx)[:, 0] - target).pow(2).mean()
            loss = policy + 0.5 * value - 0.01 * law.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            tnn.utils.clip_grad_norm_(weights, 0.5)
            optimizer.step()
            return float(loss)

        return run

    flops = 6.0 * n * (2 * dims * 64 + 2 * 64 * 64 + 64 * (actions + 1))
    return {OURS: ours, "torch": theirs}, f"b={n}", {"flops": flops}


SIDES = {"dpo": dpo, "gae": gae, "ppo": ppo}


def difference(name: str, values: dict[str, Any]) -> dict[str, dict[str, float]]:
    if name == "ppo":  # two networks, each from weights of its own
        return {side: {"last_loss": float(v)} for side, v in values.items()}
    own = np.asarray(values.pop(OURS))
    largest = np.abs(own).max()
    return {
        side: {"difference": float(np.abs(v - own).max() / largest)} for side, v in values.items()
    }


def one(name: str, config: Config) -> list[Row]:
    """Time one of SIDES."""
    makers, case, work = SIDES[name](config)
    options = {"checks": lambda v: difference(name, v), "work": lambda: work, "pause": 0.05}
    calls = {"dpo": 1, "gae": 1, "ppo": 20}[name]
    return compare(name, makers, config, case=case, targets=TARGETS[name], calls=calls, **options)


main = every(one, SIDES)
if __name__ == "__main__":
    launch(main, Config)
