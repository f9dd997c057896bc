"""Time of transformers beside PyTorch's: a step of GPT, generation with a cache, a step of DiT.

gpt_step     forward, backward and AdamW of a GPT-2 of 4 layers of 256, 8 x 128 tokens
  torch      the same blocks with scaled_dot_product_attention, eager (as nanoGPT has them)
  torch_compiled  the same, by torch.compile, where it works
  torch_transformers  transformers' GPT2LMHeadModel, eager
generate_1, generate_8   128 tokens after a prompt of one, greedily, batch 1 and 8
  torch      keys and values kept in tensors of fixed size, a Python loop over tokens
  torch_transformers  generate of transformers' GPT2LMHeadModel
dit_step     forward, backward and AdamW of DiT, 6 blocks of 192 on 16 x 16 x 4, batch 16
  torch      the same blocks, eager
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks._models import Trainer
from experiments.benchmarks._workload import OURS, Options, Row, Side, compare, every, launch
from genjax import flows
from genjax.autoregressive import generate, next_token, select
from genjax.networks import GPT, DiT

TARGETS = {"gpt_step": 1.2, "generate_1": 4.0, "generate_8": 2.0, "dit_step": 1.0}
VOCABULARY, DEPTH, WIDTH, HEADS, LENGTH = 1024, 4, 256, 8, 128
Makers = dict[str, Callable[[], Side]]


@dataclasses.dataclass(frozen=True)
class Config(Options):
    batch_size: int = 8  # rows of a step of GPT
    tokens: int = 128  # that are generated


def network() -> tuple[GPT, Any]:
    net = GPT(VOCABULARY, DEPTH, WIDTH, HEADS, max_length=LENGTH + 1)
    return net, jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))


def torch_block(causal: bool, conditioned: bool = False) -> Any:
    """A transformer block of PyTorch; with keys and values where it is given a cache."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, width: int, heads: int):
            super().__init__()
            self.heads, affine = heads, not conditioned
            self.norm_1 = nn.LayerNorm(width, elementwise_affine=affine)
            self.norm_2 = nn.LayerNorm(width, elementwise_affine=affine)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.modulation = nn.Linear(width, 6 * width) if conditioned else None

        def attend(self, h: Any, cache: Any, start: int) -> Any:
            b, length, width = h.shape
            split = lambda z: z.view(b, length, self.heads, -1).transpose(1, 2)  # noqa: E731
            q, k, v = map(split, self.qkv(h).chunk(3, dim=-1))
            if cache is not None:
                cache[0][:, :, start : start + length], cache[1][:, :, start : start + length] = (
                    k,
                    v,
                )
                k, v = (z[:, :, : start + length] for z in cache)
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal and cache is None
            )
            return self.out(out.transpose(1, 2).reshape(b, length, width))

        def forward(self, x: Any, condition: Any = None, cache: Any = None, start: int = 0) -> Any:
            six = [0, 0, 1, 0, 0, 1]
            if self.modulation is not None:
                six = self.modulation(functional.silu(condition))[:, None].chunk(6, dim=-1)
            h = self.norm_1(x)
            h = h if condition is None else h * (1 + six[1]) + six[0]
            x = x + six[2] * self.attend(h, cache, start)
            h = self.norm_2(x)
            h = h if condition is None else h * (1 + six[4]) + six[3]
            return x + six[5] * self.down(functional.gelu(self.up(h), approximate="tanh"))

    del torch
    return Block


def torch_gpt() -> Any:
    import torch
    from torch import nn

    block = torch_block(causal=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY + 1, WIDTH)
            self.places = nn.Embedding(LENGTH + 1, WIDTH)
            self.blocks = nn.ModuleList([block(WIDTH, HEADS) for _ in range(DEPTH)])
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Any, caches: Any = None, start: int = 0) -> Any:
            h = self.tokens(x) + self.places(torch.arange(start, start + x.shape[1]))
            for i, one in enumerate(self.blocks):
                h = one(h, cache=None if caches is None else caches[i], start=start)
            return self.norm(h) @ self.tokens.weight[:VOCABULARY].T

    torch.manual_seed(0)
    return Net()


def transformers_gpt(vocabulary: int) -> Any:
    import transformers

    sizes = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "n_positions": LENGTH + 1}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, bos_token_id=None, eos_token_id=None, **sizes, **none
    )
    return transformers.GPT2LMHeadModel(config)


def torch_trainer(net: Any, loss: Callable[[Any], Any]) -> Side:
    import torch

    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def run() -> float:
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        optimizer.step()
        return float(value)

    return run


def gpt_step(config: Config) -> tuple[Makers, str, dict[str, Any]]:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (config.batch_size, LENGTH))

    def ours() -> Side:
        net, params = network()

        def loss(params: Any, key: jax.Array, x: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return next_token(partial(net.apply, params), x, divisor=LENGTH)[0], {}

        return Trainer(loss, params, tokens)

    def theirs(compiled: bool = False, hugging_face: bool = False) -> Side:
        import torch
        from torch.nn import functional

        net = transformers_gpt(VOCABULARY + 1) if hugging_face else torch_gpt()
        net, x = torch.compile(net) if compiled else net, torch.from_numpy(tokens)
        before = torch.cat([torch.full((len(x), 1), VOCABULARY), x[:, :-1]], dim=1)

        def loss(net: Any) -> Any:
            logits = net(before).logits if hugging_face else net(before)
            return functional.cross_entropy(logits.flatten(0, 1), x.flatten())

        run = torch_trainer(net, loss)
        try:
            if compiled:
                run()
        except Exception as error:  # no compiler on this machine
            raise ImportError(
                f"torch.compile does not work here ({type(error).__name__})"
            ) from None
        return run

    makers = {
        OURS: ours,
        "torch": theirs,
        "torch_compiled": partial(theirs, compiled=True),
        "torch_transformers": partial(theirs, hugging_face=True),
    }
    return makers, f"{config.batch_size}x{LENGTH}", {}


def generation(config: Config, batch: int) -> tuple[Makers, str, dict[str, Any]]:
    def ours() -> Side:
        net, params = network()

        @jax.jit
        def draw(params: Any, prompt: jax.Array) -> jax.Array:
            cache = net.apply(params, batch, LENGTH + 1, method="empty_cache")
            step = partial(net.apply, net.unstacked(params), method="step")
            greedy = partial(select, temperature=0.0)
            key, num = jax.random.key(0), config.tokens
            return generate(step, cache, key, prompt, num_tokens=num, select=greedy).tokens

        prompt = jnp.zeros((batch, 1), jnp.int32)
        return lambda: jax.block_until_ready(draw(params, prompt))

    def theirs() -> Side:
        import torch

        net = torch_gpt()

        @torch.inference_mode()
        def run() -> Any:
            shape = (batch, HEADS, LENGTH + 1, WIDTH // HEADS)
            caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(DEPTH)]
            token, found = torch.full((batch, 1), VOCABULARY), []
            for t in range(config.tokens + 1):
                logits = net(token, caches, t)
                token = logits[:, -1:].argmax(-1) if t else torch.zeros_like(token)
                found.append(token)
            return torch.cat(found[1:], dim=1)

        return run

    def hugging_face() -> Side:
        import torch

        net = transformers_gpt(VOCABULARY).eval()
        prompt = torch.zeros((batch, 1), dtype=torch.long)
        options = {"do_sample": False, "use_cache": True, "pad_token_id": 0}

        def run() -> Any:
            seen = torch.ones_like(prompt)
            num = config.tokens
            return net.generate(prompt, attention_mask=seen, max_new_tokens=num, **options)

        return run

    makers = {OURS: ours, "torch": theirs, "torch_transformers": hugging_face}
    return makers, f"batch={batch}", {}


def dit_step(config: Config) -> tuple[Makers, str, dict[str, Any]]:
    batch, width, depth, heads = 16, 192, 6, 6
    x = np.random.default_rng(0).normal(size=(batch, 16, 16, 4)).astype(np.float32)

    def ours() -> Side:
        net = DiT(2, width, depth, heads, qk_norm=False)
        params = jax.jit(net.init)(jax.random.key(0), x[:1], jnp.zeros(1))

        def loss(params: Any, key: jax.Array, x: Any) -> Any:
            noise = jax.random.normal(key, x.shape)
            return flows.flow_matching_loss(partial(net.apply, params), key, noise, x)[0], {}

        return Trainer(loss, params, x)

    def theirs() -> Side:
        import torch
        from torch import nn

        block = torch_block(causal=False, conditioned=True)

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.enter, self.leave = nn.Linear(16, width), nn.Linear(width, 16)
                self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
                self.places = nn.Parameter(torch.zeros(64, width))
                self.blocks = nn.ModuleList([block(width, heads) for _ in range(depth)])
                self.norm = nn.LayerNorm(width, elementwise_affine=False)

            def forward(self, x: Any, t: Any) -> Any:
                rates = torch.exp(-torch.arange(128) / 128 * np.log(1e4))
                angle = 1000 * t[:, None] * rates
                c = self.time(torch.cat([torch.sin(angle), torch.cos(angle)], dim=1))
                h = x.view(-1, 8, 2, 8, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 64, 16)
                h = self.enter(h) + self.places
                for one in self.blocks:
                    h = one(h, c)
                h = self.leave(self.norm(h)).view(-1, 8, 8, 2, 2, 4)
                return h.permute(0, 1, 3, 2, 4, 5).reshape(x.shape)

        data = torch.from_numpy(x)

        def loss(net: Any) -> Any:
            noise, t = torch.randn_like(data), torch.rand(batch)
            share = t[:, None, None, None]
            return (net((1 - share) * noise + share * data, t) - (data - noise)).pow(2).mean()

        return torch_trainer(Net(), loss)

    return {OURS: ours, "torch": theirs}, f"batch={batch}", {}


SIDES = {
    "gpt_step": gpt_step,
    "generate_1": partial(generation, batch=1),
    "generate_8": partial(generation, batch=8),
    "dit_step": dit_step,
}


def one(name: str, config: Config) -> list[Row]:
    """Time one of SIDES."""
    makers, case, work = SIDES[name](config)
    options = {"work": lambda: work, "pause": 0.05, "calls": 3}
    return compare(name, makers, config, case=case, targets=TARGETS[name], **options)


main = every(one, SIDES)
if __name__ == "__main__":
    launch(main, Config)
