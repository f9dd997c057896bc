"""Time of the Frechet distance, KID and precision and recall beside their torch peers, on CPU.

    frechet            2,048 dimensions, covariances of 5,000 samples given, float64
      torch_symmetric  root of one covariance, then symmetric eigenvalues, torch.linalg
      torch_eigvals    eigenvalues of the product of the covariances, as torchmetrics does
    kid                5,000 x 2,048 float32, 100 subsets of 1,000
      torch_gram       one Gram matrix per pair of samples, subsets read off it by index
      torch_subsets    three kernel matrices per subset, as torchmetrics and torch-fidelity do
    precision_recall   5,000 x 2,048 float32, k = 3
      torch_cdist      cdist, kthvalue, comparisons

The sides are timed in turn, round by round, in one process; a ratio is the median over rounds of
(peer / genjax), so above 1 genjax is faster. `difference` is relative, of the values.
"""

import dataclasses
import os
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import jax
import numpy as np
import tyro

from experiments.benchmarks._table import OURS, Row, build, make_rows, show
from experiments.benchmarks._timing import Side, in_turn
from genjax.metrics import Moments, frechet_distance, kid, precision_recall

# Ratio of the best peer's time to ours that the same comparison has to give.
TARGETS = {"frechet": 1.3, "kid": 2.0, "precision_recall": 2.0}
SUBSETS, SUBSET, K = 100, 1000, 3


@dataclasses.dataclass(frozen=True)
class Config:
    rounds: int = 5
    """How often all sides are timed in turn."""
    samples: int = 5000
    """Samples on either side."""
    width: int = 2048
    """Features of a sample."""
    metrics: tuple[str, ...] = ("frechet", "kid", "precision_recall")
    """Which to time."""
    slow_peers: bool = True
    """Time the slower form of each peer too."""


def features(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Two samples that differ a little, correlated as features are."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(config.width, config.width)) / config.width**0.5
    x, y = rng.normal(size=(2, config.samples, config.width))
    return (x @ mix).astype(np.float32), (1.1 * y @ mix + 0.05).astype(np.float32)


def frechet(x: np.ndarray, y: np.ndarray, slow: bool) -> dict[str, Any]:
    moments = [Moments(v.mean(0, dtype=np.float64), np.cov(v.T.astype(np.float64))) for v in (x, y)]

    def theirs(kind: str) -> Side:
        import torch

        (m0, c0), (m1, c1) = [tuple(torch.from_numpy(part) for part in pair) for pair in moments]
        rest = ((m0 - m1) ** 2).sum() + c0.trace() + c1.trace()

        def symmetric() -> Any:
            values, vectors = torch.linalg.eigh(c0)
            root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
            return rest - 2 * torch.linalg.eigvalsh(root @ c1 @ root).clamp(min=0).sqrt().sum()

        def eigvals() -> Any:
            return rest - 2 * torch.linalg.eigvals(c0 @ c1).sqrt().real.sum()

        return {"symmetric": symmetric, "eigvals": eigvals}[kind]

    kinds = ("symmetric", "eigvals") if slow else ("symmetric",)
    peers = {f"torch_{kind}": partial(theirs, kind) for kind in kinds}
    return {OURS: lambda: lambda: frechet_distance(*moments), **peers}


def kid_sides(x: np.ndarray, y: np.ndarray, slow: bool) -> dict[str, Any]:
    key = jax.random.key(0)

    def ours() -> Side:
        with jax.enable_x64(True):
            compiled = jax.jit(lambda a, b: kid(key, a, b, num_subsets=SUBSETS, subset_size=SUBSET))

        def run() -> Any:
            with jax.enable_x64(True):  # sums in float64
                return jax.block_until_ready(compiled(x, y)).mean

        return run

    def theirs(kind: str) -> Side:
        import torch

        tx, ty = torch.from_numpy(x), torch.from_numpy(y)
        # Both sides draw the same subsets, so that the values can be compared.
        rows = [
            torch.from_numpy(
                np.array(jax.vmap(lambda k: jax.random.permutation(k, len(x))[:SUBSET])(keys))
            ).long()
            for keys in (jax.random.split(k, SUBSETS) for k in jax.random.split(key))
        ]

        def kernel(a: Any, b: Any) -> Any:
            return (a @ b.T / a.shape[1] + 1) ** 3

        def unbiased(xx: Any, yy: Any, xy: Any) -> Any:
            within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
            return within / (SUBSET * (SUBSET - 1)) - 2 * xy.mean()

        def gram() -> Any:
            xx, yy, xy = kernel(tx, tx), kernel(ty, ty), kernel(tx, ty)
            values = [
                unbiased(xx[i][:, i], yy[j][:, j], xy[i][:, j]) for i, j in zip(*rows, strict=True)
            ]
            return torch.stack(values).mean()

        def subsets() -> Any:
            values = []
            for i, j in zip(*rows, strict=True):
                a, b = tx[i], ty[j]
                values.append(unbiased(kernel(a, a), kernel(b, b), kernel(a, b)))
            return torch.stack(values).mean()

        return {"gram": gram, "subsets": subsets}[kind]

    kinds = ("gram", "subsets") if slow else ("gram",)
    return {OURS: ours, **{f"torch_{kind}": partial(theirs, kind) for kind in kinds}}


def precision_recall_sides(x: np.ndarray, y: np.ndarray, slow: bool) -> dict[str, Any]:
    del slow

    def ours() -> Side:
        compiled = jax.jit(lambda a, b: precision_recall(a, b, k=K))
        return lambda: sum(compiled(x, y))

    def theirs() -> Side:
        import torch

        tx, ty = torch.from_numpy(x), torch.from_numpy(y)

        def cdist() -> Any:
            # The point itself is the nearest: the k-th other one is number k + 1.
            near_x, near_y = (torch.cdist(v, v).kthvalue(K + 1, dim=1).values for v in (tx, ty))
            between = torch.cdist(tx, ty)
            inside = (between <= near_x[:, None]).any(0).float().mean()
            return inside + (between <= near_y[None]).any(1).float().mean()

        return cdist

    return {OURS: ours, "torch_cdist": theirs}


SIDES = {"frechet": frechet, "kid": kid_sides, "precision_recall": precision_recall_sides}


def main(config: Config) -> list[Row]:
    x, y = features(config)
    n, d = x.shape
    # Three matrices of inner products (of which two are symmetric), or the eigenvalues of one.
    products = {"flops": 2.0 * d * (2 * n * n / 2 + n * n)}
    work = {"frechet": {"flops": 4 / 3 * d**3}, "kid": products, "precision_recall": products}
    rows: list[Row] = []
    for metric in config.metrics:
        makers = SIDES[metric](x, y, config.slow_peers)
        sides, notes = build(makers, [name for name in makers if name != OURS])
        values: dict[str, float] = {}

        def valued(name: str, run: Side, values: dict[str, float] = values) -> Side:
            def call() -> None:
                values[name] = float(run())

            return call

        times = in_turn({k: valued(k, run) for k, run in sides.items()}, rounds=config.rounds)
        checks = {k: {"difference": abs(v / values[OURS] - 1)} for k, v in values.items()}
        checks.pop(OURS)
        options = {"targets": TARGETS[metric], "checks": checks, "notes": notes}
        case = f"n={n} d={d}"
        rows += show(make_rows(metric, times, case=case, work=work[metric], **options))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
