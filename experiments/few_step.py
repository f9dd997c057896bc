"""Samples in one step, or a few: mean flows, shortcuts, consistency models, distillation.

    mean_flow    u(x, t, s), the mean velocity from t to s, by the identity of its derivative
    shortcut     the same u, where one long step is two of half the length
    consistency  f(x, sigma), the end of the flow through x, equal at neighbouring noise levels;
                 with a teacher these lie one of its steps apart
    progressive  a finished diffusion run whose steps are halved, round by round
    matching     one step, moved to where its samples have the density of the teacher's

    python -m experiments.few_step
    python -m experiments.few_step --num-steps 2
    python -m experiments.few_step --method shortcut --network dit --conditional
    python -m experiments.few_step --method progressive --teacher runs/diffusion/1 --num-steps 4

The summary has precision and recall after 1, 2 and 4 steps beside those of `num_steps`; their
samples from the same noise stand in steps.png.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _distillation, _judge, _pictures, _run, _system
from experiments._data import Data, load_data
from experiments._networks import NetworkConfig, network_of
from experiments._system import Row, System, train
from genjax import diffusion as gd
from genjax import flows

ROWS = (
    Row("mean_flow", "Mean flow, one step", {}, {"width": 128}),
    Row("mean_flow_2", "Mean flow, two steps", {"num_steps": 2}, {"width": 128, "num_steps": 2}),
)
SHOWN = (1, 2, 4)  # numbers of steps that are compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(NetworkConfig):
    """Train a model that samples in few steps, and compare 1, 2 and 4 of them."""

    method: Literal["mean_flow", "shortcut", "consistency", "progressive", "matching"] = "mean_flow"
    """What is trained, see above."""
    teacher: str | None = None
    """Folder of a run of experiments.diffusion (consistency, progressive, matching)."""
    num_steps: int = 1
    """Steps of the reported samples, and the least that a mean flow learns."""
    dropout: float = 0.1
    conditional: bool = False
    """Give the labels to the network."""
    equal: float = 0.5
    """Share of the pairs of times that are equal: flow matching (mean_flow)."""
    ends: float = 0.3
    """Share of the pairs that begin at 0, and of those that end at 1 (mean_flow)."""
    power: float = 0.75
    """Power of the squared error that a pair's loss is divided by (mean_flow)."""
    halvings: int = 7
    """Step lengths 1, 1/2, ... that are trained (shortcut)."""
    levels: int = 160
    """Noise levels at the end of training; their number doubles from 10 (consistency)."""
    first_steps: int = 16
    """Steps of the first student, halved from round to round until num_steps (progressive)."""
    learning_rate: float = 1e-3
    """Adam's rate, falling along a cosine."""
    ema: float = 0.999
    steps: int = 12_000
    batch_size: int = 256
    steps_per_call: int = 50
    log_every: int = 100
    save_every: int = 4000


def main(config: Config) -> dict[str, Any]:
    """Train, sample, judge, compare numbers of steps; returns the summary."""
    data = load_data(config)
    system = build(config, data)
    return train(config, system, data, partial(report, config, data, system))


def build(config: Config, data: Data) -> System:
    """What the method trains."""
    if config.method == "progressive":
        return _distillation.progressive(config, data)
    if config.method == "matching":
        return _distillation.matching(config, data)
    return consistency(config, data) if config.method == "consistency" else flow(config, data)


def flow(config: Config, data: Data) -> System:
    """A mean velocity, by mean flow or shortcuts."""
    network, scaling = network_of(config, data), data.scaling()
    settings = {"equal": config.equal, "ends": config.ends, "num_steps": config.num_steps}

    def init(key: jax.Array) -> Any:
        x, t = jnp.zeros((1, *data.spec.shape)), jnp.zeros(1)
        return network.init(key, x, t, end=t)

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_data, key_pairs, key_time, key_net, key_loss = jax.random.split(key, 5)
        x0, x1 = flows.sample_pairs(key_pairs, scaling.dequantise(key_data, batch["x"]))
        mean = mean_velocity(
            network, params, batch["label"] if config.conditional else None, key_net
        )
        if config.method == "shortcut":
            losses, _ = flows.shortcut_loss(mean, key_loss, x0, x1, halvings=config.halvings)
            return losses, {}
        t, s = flows.mean_flow_times(key_time, len(x1), **settings)
        losses, aux = flows.mean_flow_loss(mean, key_loss, x0, x1, t=t, s=s, power=config.power)
        return losses, {"squared_error": aux["squared_error"]}

    return System(
        init,
        loss,
        _distillation.adam(config),
        partial(sample, network, data, config.num_steps),
        evaluations=config.num_steps,
        labels=data.labels() if config.conditional else None,
        remat=config.network == "dit",
    )


def consistency(config: Config, data: Data) -> System:
    """A consistency model, trained alone or by a teacher; the step is what the carry has."""
    network, scaling, process = network_of(config, data), data.scaling(), gd.EDM()
    scale = float(np.std(np.asarray(scaling.to_continuous(data.train["x"]))))
    teacher = None if config.teacher is None else _distillation.open_teacher(config, data)

    def function(params: Any, label: Any = None, key: Any = None) -> Callable[..., jax.Array]:
        # log(sigma) / 4 lies between -1.6 and 1.1; the network's times are of [0, 1].
        net = lambda x, c: network.apply(  # noqa: E731
            params, x, (c + 1.6) / 2.8, label, dropout_key=key
        )
        return gd.consistency_function(net, sigma_data=scale)

    def loss(params: Any, key: jax.Array, batch: Any, step: Any) -> Any:
        key_data, key_loss, key_net = jax.random.split(key, 3)
        x = scaling.dequantise(key_data, batch["x"])
        options: dict[str, Any] = {}
        if teacher is not None:
            label = _distillation.labels(data, batch)
            options["denoiser"] = _distillation.denoiser_of(teacher, data, label)
        losses, aux = gd.consistency_loss(
            function(params, batch["label"] if config.conditional else None, key_net),
            key_loss,
            x,
            num_levels=gd.num_levels_at(step, config.steps, last=config.levels),
            sigma_max=float(process.t_max),
            **options,
        )
        return losses, {"distance_squared": aux["distance_squared"]}, {}

    def draw(params: Any, key: jax.Array, n: int, label: Any = None, steps: int = 0) -> jax.Array:
        steps = steps or config.num_steps
        # From pure noise to a level at which some of the image is seen.
        sigmas = jnp.geomspace(float(process.t_max), 0.8 if steps > 1 else process.t_max, steps)
        f = function(params, label)
        x = gd.consistency_sample(f, key, (n, *data.spec.shape), sigmas=sigmas)
        return scaling.to_levels(x)

    def init(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, *data.spec.shape)), jnp.zeros(1))

    return System(
        init,
        loss,
        _distillation.adam(config),
        draw,
        evaluations=config.num_steps,
        labels=data.labels() if config.conditional else None,
        init_carry=lambda key, params: jnp.zeros((), jnp.int32),
        absorb=lambda step, params, seen: step + 1,
    )


def mean_velocity(network: Any, params: Any, label: Any = None, key: Any = None) -> Callable:
    """u(x, t, s), with label and dropout key closed over."""
    return lambda x, t, s: network.apply(params, x, t, label, end=s, dropout_key=key)


def sample(
    network: Any,
    data: Data,
    num_steps: int,
    params: Any,
    key: jax.Array,
    n: int,
    label: Any = None,
    steps: int = 0,
) -> jax.Array:
    """Samples in so many steps; the noise is a function of the key alone."""
    noise = jax.random.normal(key, (n, *data.spec.shape))
    mean = mean_velocity(network, params, label)
    y = flows.mean_flow_sample(mean, noise, num_steps=steps or num_steps)
    return data.scaling().to_levels(y)


def report(
    config: Config, data: Data, system: System, run: Any, params: Any, samples: Any
) -> dict[str, Any]:
    """Precision and recall (in the plane: modes) after 1, 2 and 4 steps, and their pictures."""
    if config.method == "matching":  # one step is all there is
        return {}
    key, n, label = _system.keys(config.seed).sample, len(samples), system.labels
    reference, found, shown = _judge.reference(data), {}, []
    sample: Any = system.sample
    for steps in SHOWN:
        draw = jax.jit(lambda p, steps=steps: sample(p, key, n, label, steps=steps))
        x = np.asarray(draw(params))
        judged = _judge.judge(reference, x)
        names = [k for k in ("precision", "recall", "modes", "high_quality_share") if k in judged]
        found |= {f"{name}_{steps}_steps": judged[name] for name in names}
        shown.append(x)
    path = run.folder / "steps.png"
    if data.kind == "points":
        titles = [f"{steps} steps" for steps in SHOWN]
        sets = dict(zip(titles, shown, strict=True))
        _pictures.save_points(path, sets, title="samples by steps of the sampler")
    else:
        rows = np.concatenate([x[:10] for x in shown])
        title, high = f"samples after {SHOWN} steps, by row", (data.spec.levels or 256) - 1
        _pictures.save_grid(path, rows, title=title, columns=10, high=high)
    return found


if __name__ == "__main__":
    _run.launch(main, Config)
