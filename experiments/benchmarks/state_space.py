"""Time of the selective scan and of S4D beside forms in PyTorch, on CPU.

    selective_scan, _gradient   batch 4, 256 channels, 16 states, the full formula with D and z
      torch-loop      one position after another, coefficients formed on the way
      torch-stored    coefficients of all positions formed first, as Mamba's reference does
      torch-doubling  a scan in log2(length) sweeps over stored coefficients
    s4d, s4d_gradient           kernel of 64 states and convolution, batch 4, 256 channels
      torch           the Vandermonde matrix of all positions, and FFTs

A gradient is that of the sum of y for every input, the forward pass included. PyTorch's gradients
of the selective scan are left out beyond 4,096 positions: at 8,192 the loop's takes minutes (each
position adds to a gradient of all), the doubling's more than 24 GB. `relative_gap`: the largest
difference from genjax's over its largest value.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks._models import waiting
from experiments.benchmarks._workload import OURS, Options, Row, Side, compare, every, launch
from genjax import state_space

TARGETS = {"selective_scan": 8.0, "selective_scan_gradient": 4.0, "s4d": 8.0, "s4d_gradient": 8.0}
BATCH, CHANNELS, STATES, PAIRS = 4, 256, 16, 32
SHORT = 4096  # positions that PyTorch's gradients of the selective scan are timed at


@dataclasses.dataclass(frozen=True)
class Config(Options):
    rounds: int = 5
    lengths: tuple[int, ...] = (2048, 8192)
    """Positions."""
    chunk: int | None = None
    """Positions that the selective scan holds at once (default: its own)."""
    stored: bool = True
    """Time torch-stored, whose gradient takes minutes, where its gradient is not asked for."""


def scan_inputs(length: int) -> dict[str, np.ndarray]:
    """u, dt, A, B, C, D, z."""
    rng = np.random.default_rng(0)
    wide, narrow = (BATCH, length, CHANNELS), (BATCH, length, STATES)
    made = {
        "u": rng.normal(size=wide),
        "dt": np.logaddexp(0, rng.normal(-3, 1, size=wide)),
        "A": -np.tile(np.arange(1.0, STATES + 1), (CHANNELS, 1)),
        "B": rng.normal(size=narrow),
        "C": rng.normal(size=narrow),
        "D": rng.normal(size=CHANNELS),
        "z": rng.normal(size=wide),
    }
    return {name: x.astype(np.float32) for name, x in made.items()}


def s4d_inputs(length: int) -> dict[str, np.ndarray]:
    """u, eigenvalues, c and dt."""
    rng = np.random.default_rng(0)
    shape = (CHANNELS, PAIRS)
    made = {
        "u": rng.normal(size=(BATCH, length, CHANNELS)).astype(np.float32),
        "eigenvalues": np.tile(-0.5 + 1j * np.pi * np.arange(PAIRS), (CHANNELS, 1)),
        "c": rng.normal(size=shape) + 1j * rng.normal(size=shape),
        "dt": np.exp(rng.uniform(np.log(1e-3), np.log(0.1), CHANNELS)).astype(np.float32),
    }
    return {k: x.astype(np.complex64) if np.iscomplexobj(x) else x for k, x in made.items()}


def jax_side(name: str, length: int, config: Config) -> Side:
    """genjax's function, or its gradient."""
    scan = name.startswith("selective")
    inputs = scan_inputs(length) if scan else s4d_inputs(length)

    def forward(x: dict[str, jax.Array]) -> jax.Array:
        if scan:
            return state_space.selective_scan(**x, chunk=config.chunk)[0]
        one = jnp.ones((CHANNELS, PAIRS))
        return state_space.s4d_convolution(x["u"], x["eigenvalues"], one, x["c"], x["dt"])[0]

    run = jax.jit(jax.grad(lambda x: jnp.sum(forward(x))) if "gradient" in name else forward)
    return waiting(run, jax.tree.map(jnp.asarray, inputs))


def torch_side(form: str, name: str, length: int) -> Side:
    """One of the forms in PyTorch, or its gradient."""
    import torch

    scan, gradient = name.startswith("selective"), "gradient" in name
    inputs = scan_inputs(length) if scan else s4d_inputs(length)
    x = {k: torch.from_numpy(v).requires_grad_(gradient) for k, v in inputs.items()}
    forward = partial({"stored": stored, "loop": loop, "doubling": doubling, "s4d": s4d}[form], x)

    def run() -> Any:
        if not gradient:
            with torch.no_grad():
                return forward().numpy()
        found = torch.autograd.grad(forward().sum(), list(x.values()))
        # PyTorch gives the conjugate of jax's gradient for complex numbers.
        found = dict(zip(x, found, strict=True))
        return {k: v.resolve_conj().numpy() for k, v in found.items()}

    return run


def finished(x: Any, y: Any) -> Any:
    """(y + D u) silu(z)."""
    import torch.nn.functional as F

    return (y + x["D"] * x["u"]) * F.silu(x["z"])


def loop(x: Any) -> Any:
    """One position after another."""
    import torch

    h, ys = x["u"].new_zeros(BATCH, CHANNELS, STATES), []
    drive = x["dt"] * x["u"]
    for t in range(x["u"].shape[1]):
        decay = torch.exp(x["dt"][:, t, :, None] * x["A"])
        h = decay * h + drive[:, t, :, None] * x["B"][:, t, None]
        ys.append((h @ x["C"][:, t, :, None])[..., 0])
    return finished(x, torch.stack(ys, 1))


def coefficients(x: Any) -> tuple[Any, Any]:
    """exp(dt A) and dt B u of every position."""
    import torch

    decay = torch.exp(x["dt"][..., None] * x["A"])
    return decay, (x["dt"] * x["u"])[..., None] * x["B"][:, :, None]


def stored(x: Any) -> Any:
    """Coefficients first, then a loop."""
    import torch

    (decay, drive), h, ys = coefficients(x), 0, []
    for t in range(x["u"].shape[1]):
        h = decay[:, t] * h + drive[:, t]
        ys.append((h @ x["C"][:, t, :, None])[..., 0])
    return finished(x, torch.stack(ys, 1))


def doubling(x: Any) -> Any:
    """Each sweep joins every position with the one 1, 2, 4, ... before it."""
    import torch
    import torch.nn.functional as F

    (a, h), reach = coefficients(x), 1
    while reach < x["u"].shape[1]:
        before = F.pad(h, (0, 0, 0, 0, reach, 0))[:, :-reach]
        h = h + a * before
        a = a * F.pad(a, (0, 0, 0, 0, reach, 0), value=1.0)[:, :-reach]
        reach *= 2
    return finished(x, torch.einsum("btcn,btn->btc", h, x["C"]))


def s4d(x: Any) -> Any:
    """The kernel by zero-order hold, and the convolution."""
    import torch

    length = x["u"].shape[1]
    rate = x["dt"][:, None] * x["eigenvalues"]
    weight = 2 * x["c"] * (torch.exp(rate) - 1) / x["eigenvalues"]
    powers = torch.exp(rate[..., None] * torch.arange(length))
    kernel = torch.einsum("cn,cnl->cl", weight, powers).real
    u = x["u"].transpose(1, 2)
    spectrum = torch.fft.rfft(u, 2 * length) * torch.fft.rfft(kernel, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length].transpose(1, 2)


def gaps(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The largest relative difference of each side from genjax's."""

    def gap(ours: Any, theirs: Any) -> float:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        theirs = np.conj(theirs) if np.iscomplexobj(theirs) else theirs
        return float(np.abs(ours - theirs).max() / np.abs(ours).max())

    def widest(side: Any) -> float:
        return max(jax.tree.leaves(jax.tree.map(gap, results[OURS], side)))

    return {k: {"relative_gap": widest(v)} for k, v in results.items() if k != OURS}


def one(name: str, config: Config) -> list[Row]:
    """Time one of TARGETS at every length."""
    rows: list[Row] = []
    for length in config.lengths:
        makers: dict[str, Any] = {OURS: partial(jax_side, name, length, config)}
        if name.startswith("s4d"):
            makers["torch"] = partial(torch_side, "s4d", name, length)
        else:
            gradient = "gradient" in name
            forms = [] if gradient and length > SHORT else ["loop", "doubling"]
            if config.stored and not gradient:
                forms.append("stored")
            makers |= {f"torch-{f}": partial(torch_side, f, name, length) for f in forms}
        options = {"targets": TARGETS[name], "checks": gaps, "seconds": 30.0}
        rows += compare(name, makers, config, case=f"L={length}", **options)
    return rows


main = every(one, TARGETS)
if __name__ == "__main__":
    launch(main, Config)
