"""Mutual information of correlated Gaussians by a critic, where the truth is known.

    x ~ N(0, I),  y = rho x + sqrt(1 - rho^2) e:   I(x; y) = -dims log(1 - rho^2) / 2     (nats)
    I(x; y) = KL(p(x, y) || p(x) p(y)) >= the bound of the critic T(x, y)

    mine              Donsker-Varadhan, whose gradient divides by a running average of E exp(T)
    donsker_varadhan  the same bound with the average of the batch, whose gradient is biased
    nwj               E T - E exp(T - 1): no bias and no average, but more variance
    jensen_shannon    the critic of a GAN, which goes to log p(x, y) / p(x) p(y)

    python -m experiments.mutual_information
    python -m experiments.mutual_information --rho 0.9 --dims 5 --estimator nwj

The pairs of p(x) p(y) are those of the batch with y moved on by one. Every batch is fresh, and the
estimate is the bound on 100,000 pairs that no step has seen; of jensen_shannon it is that of
Donsker and Varadhan. estimate.png shows it on its way to the truth. No such bound sees more than
the log of the number of pairs that it is taken on (McAllester and Stratos 2020, arXiv:1811.04251).
Belghazi et al. 2018 (arXiv:1801.04062).
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run
from experiments._data import Data
from experiments._system import System, parameter_count, prepare, weights
from genjax import checks
from genjax.adversarial import donsker_varadhan, gan, nwj
from genjax.data import DataSpec
from genjax.networks import MLP
from genjax.training import export_npz
from genjax.training.record import read_metrics

TEST_PAIRS = 100_000
BOUNDS: dict[str, Any] = {
    "mine": donsker_varadhan,
    "donsker_varadhan": donsker_varadhan,
    "nwj": nwj,
    "jensen_shannon": gan,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Estimate the mutual information of two Gaussian vectors."""

    dataset: Literal["gaussians"] = "gaussians"
    """Pairs of correlated Gaussians."""
    rho: float = 0.5
    """Correlation of each coordinate of x with that of y."""
    dims: int = 1
    """Coordinates of x, and of y."""
    estimator: Literal["mine", "donsker_varadhan", "nwj", "jensen_shannon"] = "mine"
    """The bound that the critic makes large."""
    average: float = 0.99
    """Decay of the running average of E exp(T) (mine)."""
    width: int = 64
    """Units in each of the critic's two hidden layers."""
    learning_rate: float = 2e-3
    steps: int = 3000
    batch_size: int = 256
    steps_per_call: int = 20
    evaluate_every: int = 100
    """Steps between estimates, which the picture shows."""


def main(config: Config) -> dict[str, Any]:
    """Train the critic and compare its bound with the truth; returns the summary."""
    data = load_data(config)
    system = build(config, data)
    training, pairs = prepare(config, system, data), jnp.asarray(data.test["x"])
    truth = -config.dims * math.log1p(-(config.rho**2)) / 2

    @jax.jit
    def estimate(params: Any) -> jax.Array:
        bound = nwj if config.estimator == "nwj" else donsker_varadhan
        return bound(*scores(config, params, pairs)).bound

    def evaluate(state: Any) -> dict[str, Any]:
        return {"estimate": estimate(weights(config, system, state))}

    with _run.start_run(config) as run:
        state = _run.fit(run, *training, evaluate=evaluate)
        params = weights(config, system, state)
        export_npz(run.folder / "params.npz", params)
        found = float(estimate(params))
        plot(run, truth)
        summary = {"estimate": found, "truth": truth, "error": abs(found - truth)}
        return _run.finish(run, {"parameters": parameter_count(params), **summary})


def load_data(config: Config) -> Data:
    """The pairs of the test; those of training are drawn for each step."""
    checks.integer("dims", config.dims, 1)
    if not -1 < config.rho < 1:
        raise ValueError(f"rho must lie in (-1, 1), got {config.rho}")
    if config.shift or config.flip:
        raise ValueError("shift and flip are for images")
    spec = DataSpec("gaussians", "points", (2 * config.dims,), None, None)
    test = {"x": sample_pairs(config, np.random.default_rng([config.seed, 1]), TEST_PAIRS)}
    return Data({}, test, spec)


def sample_pairs(config: Config, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw [count, 2 dims]: x, then y."""
    x, noise = rng.normal(size=(2, count, config.dims))
    y = config.rho * x + math.sqrt(1 - config.rho**2) * noise
    return np.concatenate([x, y], axis=1).astype(np.float32)


def build(config: Config, data: Data) -> System:
    """The critic, its loss and, for mine, the average that the state carries."""
    critic = network(config)

    def loss(params: Any, key: Any, batch: Any, *carry: Any) -> Any:
        real, fake = scores(config, params, batch["x"])
        average = {"log_average": carry[0], "decay": config.average} if carry else {}
        out = BOUNDS[config.estimator](real, fake, **average)
        # The bound is one number of the whole batch, the same for each of its pairs.
        losses = jnp.broadcast_to(out.critic, real.shape)
        return losses, {"bound": out.bound}, *([out.log_average] if carry else [])

    def fresh(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([config.seed, 0, step])
        pairs = sample_pairs(config, rng, config.batch_size)
        return {"x": np.split(pairs, jax.process_count())[jax.process_index()]}

    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    return System(
        init=lambda key: critic.init(key, jnp.zeros((1, 2 * config.dims))),
        loss=loss,
        optimizer=optax.adam(rate),
        # Before the first batch: its own mean is taken.
        init_carry=(lambda key, params: -jnp.inf) if config.estimator == "mine" else None,
        batches=lambda _: fresh,
    )


def scores(config: Config, params: Any, pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """T of the pairs, and of the same with every x beside another's y."""
    x, y = jnp.split(pairs, 2, axis=1)
    apart = jnp.concatenate([x, jnp.roll(y, 1, axis=0)], axis=1)
    critic = network(config)
    return critic.apply(params, pairs)[:, 0], critic.apply(params, apart)[:, 0]


def network(config: Config) -> MLP:
    """T(x, y)."""
    return MLP((config.width, config.width, 1), activation=jax.nn.relu)


def plot(run: _run.Run, truth: float) -> None:
    """Draw the bound of the batches, the estimates and the truth against the step."""
    lines = read_metrics(run.folder / "metrics.jsonl")
    curves: dict[str, Any] = {}
    for title, name in {"batches": "bound", "estimate": "eval/estimate"}.items():
        rows = [line for line in lines if line.get(name) is not None]
        curves[title] = [line["step"] for line in rows], [line[name] for line in rows]
    curves["truth"] = [0, lines[-1]["step"]], [truth, truth]
    _pictures.save_curves(
        run.folder / "estimate.png",
        curves,
        title="mutual information, estimated and true",
        y_label="nats",
    )


if __name__ == "__main__":
    _run.launch(main, Config)
