"""Time of the Frechet distance, KID and precision and recall beside their torch peers, on CPU.

    frechet            2,048 dimensions, covariances of 5,000 samples given, float64
      torch_symmetric  root of one covariance, then symmetric eigenvalues, torch.linalg
      torch_eigvals    eigenvalues of the product of the covariances, as torchmetrics does
    kid                5,000 x 2,048 float32, 100 subsets of 1,000
      torch_gram       one Gram matrix per pair of samples, subsets read off it by index
      torch_subsets    three kernel matrices per subset, as torchmetrics and torch-fidelity do
    precision_recall   5,000 x 2,048 float32, k = 3
      torch_cdist      cdist, kthvalue, comparisons

`difference` is relative, of the values.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.benchmarks._workload import OURS, Options, Row, Side, compare, every, launch
from genjax.metrics import Moments, frechet_distance, kid, precision_recall

TARGETS = {"frechet": 1.3, "kid": 2.0, "precision_recall": 2.0}
SUBSETS, SUBSET, K = 100, 1000, 3
Makers = dict[str, Callable[[], Side]]


@dataclasses.dataclass(frozen=True)
class Config(Options):
    rounds: int = 5
    samples: int = 5000  # samples on either side
    width: int = 2048  # features of a sample


def features(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Two samples that differ a little, correlated as features are."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(config.width, config.width)) / config.width**0.5
    x, y = rng.normal(size=(2, config.samples, config.width))
    return (x @ mix).astype(np.float32), (1.1 * y @ mix + 0.05).astype(np.float32)


def frechet(x: np.ndarray, y: np.ndarray) -> Makers:
    moments = [Moments(v.mean(0, dtype=np.float64), np.cov(v.T.astype(np.float64))) for v in (x, y)]

    def theirs(symmetric: bool) -> Side:
        import torch

        (m0, c0), (m1, c1) = [tuple(torch.from_numpy(part) for part in pair) for pair in moments]
        rest = ((m0 - m1) ** 2).sum() + c0.trace() + c1.trace()

        def by_root() -> Any:
            values, vectors = torch.linalg.eigh(c0)
            root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
            return rest - 2 * torch.linalg.eigvalsh(root @ c1 @ root).clamp(min=0).sqrt().sum()

        def by_product() -> Any:
            return rest - 2 * torch.linalg.eigvals(c0 @ c1).sqrt().real.sum()

        return by_root if symmetric else by_product

    return {
        OURS: lambda: lambda: frechet_distance(*moments),
        "torch_symmetric": partial(theirs, True),
        "torch_eigvals": partial(theirs, False),
    }


def kid_sides(x: np.ndarray, y: np.ndarray) -> Makers:
    key = jax.random.key(0)

    def ours() -> Side:
        with jax.enable_x64(True):
            compiled = jax.jit(lambda a, b: kid(key, a, b, num_subsets=SUBSETS, subset_size=SUBSET))

        def run() -> Any:
            with jax.enable_x64(True):  # sums in float64
                return jax.block_until_ready(compiled(x, y)).mean

        return run

    def theirs(from_gram: bool) -> Side:
        import torch

        tx, ty = torch.from_numpy(x), torch.from_numpy(y)
        # Both sides draw the same subsets, so that the values can be compared.
        subset = jax.vmap(lambda k: jax.random.permutation(k, len(x))[:SUBSET])
        drawn = [subset(jax.random.split(k, SUBSETS)) for k in jax.random.split(key)]
        pairs = list(zip(*(torch.tensor(np.array(rows)).long() for rows in drawn), strict=True))

        def kernel(a: Any, b: Any) -> Any:
            return (a @ b.T / a.shape[1] + 1) ** 3

        def unbiased(xx: Any, yy: Any, xy: Any) -> Any:
            within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
            return within / (SUBSET * (SUBSET - 1)) - 2 * xy.mean()

        def gram() -> Any:
            xx, yy, xy = kernel(tx, tx), kernel(ty, ty), kernel(tx, ty)
            values = [unbiased(xx[i][:, i], yy[j][:, j], xy[i][:, j]) for i, j in pairs]
            return torch.stack(values).mean()

        def subsets() -> Any:
            taken = ((tx[i], ty[j]) for i, j in pairs)
            values = [unbiased(kernel(a, a), kernel(b, b), kernel(a, b)) for a, b in taken]
            return torch.stack(values).mean()

        return gram if from_gram else subsets

    return {OURS: ours, "torch_gram": lambda: theirs(True), "torch_subsets": lambda: theirs(False)}


def precision_recall_sides(x: np.ndarray, y: np.ndarray) -> Makers:
    def ours() -> Side:
        compiled = jax.jit(lambda a, b: precision_recall(a, b, k=K))
        return lambda: float(sum(compiled(x, y)))

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


def difference(values: dict[str, Any]) -> dict[str, dict[str, float]]:
    own = float(values.pop(OURS))
    return {name: {"difference": abs(float(v) / own - 1)} for name, v in values.items()}


def one(metric: str, config: Config) -> list[Row]:
    """Time one of TARGETS."""
    x, y = features(config)
    n, d = x.shape
    # Three matrices of inner products (of which two are symmetric), or the eigenvalues of one.
    flops = 4 / 3 * d**3 if metric == "frechet" else 2.0 * d * (2 * n * n / 2 + n * n)
    figures = {"checks": difference, "work": lambda: {"flops": flops}}
    options = {"case": f"n={n} d={d}", "targets": TARGETS[metric], **figures}
    return compare(metric, SIDES[metric](x, y), config, **options)


main = every(one, TARGETS)
if __name__ == "__main__":
    launch(main, Config)
