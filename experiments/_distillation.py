"""A finished diffusion run distilled into few steps: three systems that have it as their teacher.

consistency   f at neighbouring noise levels, one Heun step of the teacher apart
progressive   one step of the student is two of the teacher, which then becomes the student
matching      one step; the teacher's denoiser beside that of the generator's own samples
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from experiments import _run, _system, diffusion
from experiments._data import Data
from experiments._system import System
from genjax import diffusion as gd

COSINE = gd.Cosine()  # the clock of progressive distillation: equal steps in its time suit images


class Teacher(NamedTuple):
    """The finished run's model and averaged weights, and whether it takes labels."""

    model: diffusion.Model
    params: Any
    config: Any


def open_teacher(config: Any, data: Data) -> Teacher:
    """Open the run `config.teacher` of `experiments.diffusion`; raises RunError where there is
    none, or it is of another kind or of other data."""
    if config.teacher is None:
        raise _run.RunError(
            f"method {config.method} needs --teacher, a run of experiments.diffusion"
        )
    _, params, found = _system.reopen(config.teacher)
    if not isinstance(found, diffusion.Config):
        raise _run.RunError(f"teacher must be a run of experiments.diffusion, got {config.teacher}")
    if found.dataset != config.dataset:
        raise _run.RunError(
            f"teacher {config.teacher} is of the data set {found.dataset!r}, got {config.dataset!r}"
        )
    return Teacher(diffusion.make_model(found, data), params, found)


def in_clock(
    denoise: Callable[..., jax.Array], source: gd.Process, target: gd.Process
) -> Callable[..., jax.Array]:
    """The denoiser of process `source` for x_t of process `target`, at the same noise ratio."""

    def run(x: jax.Array, t: jax.Array) -> jax.Array:
        ratio = jnp.minimum(target.noise_ratio(t), source.noise_ratio(source.t_max))
        s = jnp.clip(source.time_of_noise_ratio(ratio), 0, source.t_max)
        # Noise against noise: at the end of the clock, past the source's largest ratio, the signal
        # is too small to count.
        scale = source.sigma(s) / jnp.maximum(target.sigma(t), 1e-6)
        scale = scale.reshape(-1, *(1,) * (x.ndim - 1))
        return denoise(scale * x, s)

    return run


def progressive(config: Any, data: Data) -> System:
    """Rounds of equal length, in which the steps halve from `first_steps` to `num_steps`."""
    teacher, scaling = open_teacher(config, data), data.scaling()
    model, rounds = teacher.model, (config.first_steps // config.num_steps).bit_length()
    if not rounds or config.first_steps != config.num_steps << (rounds - 1):
        raise ValueError(
            f"first_steps must be num_steps * 2^k, got {config.first_steps} and {config.num_steps}"
        )
    length = -(-config.steps // rounds)

    def denoise(params: Any, label: Any, key: Any = None) -> Callable[..., jax.Array]:
        return in_clock(model.denoise(params, label, key), model.process, COSINE)

    def loss(params: Any, key: Any, batch: Any, carry: Any) -> Any:
        key_x, key_loss = jax.random.split(key)
        x, label = scaling.dequantise(key_x, batch["x"]) - model.shift, labels(data, batch)
        steps = config.first_steps // 2 ** (carry["step"] // length)
        losses, _ = gd.progressive_distillation_loss(
            denoise(params, label),
            denoise(carry["teacher"], label),
            key_loss,
            x,
            process=COSINE,
            num_steps=steps,
        )
        return losses / x[0].size, {}, {}

    def absorb(carry: Any, params: Any, seen: Any) -> Any:
        step = carry["step"] + 1
        change = lambda old, new: jnp.where(step % length == 0, new, old)  # noqa: E731
        return {"step": step, "teacher": jax.tree.map(change, carry["teacher"], params)}

    def sample(params: Any, key: Any, n: int, label: Any = None, steps: int = 0) -> jax.Array:
        steps = steps or config.num_steps
        times = gd.time_grid(COSINE, steps, spacing="uniform")
        shape = (n, *data.spec.shape)
        options = {"process": COSINE, "times": times, "step": gd.ddim_step}
        x = gd.sample(denoise(params, as_labels(label)), key, shape, **options)
        return scaling.to_levels(x + model.shift)

    start = lambda key, params: {"step": jnp.zeros((), jnp.int32), "teacher": params}  # noqa: E731
    system = System(lambda key: teacher.params, loss, adam(config), sample, init_carry=start)
    return system._replace(absorb=absorb, evaluations=config.num_steps, labels=asked(data))


def matching(config: Any, data: Data) -> System:
    """A generator of one step against the denoiser of its own samples (the critic of the pair)."""
    teacher, scaling = open_teacher(config, data), data.scaling()
    model, process = teacher.model, teacher.model.process
    top = jnp.asarray(
        process.time_of_noise_ratio(jnp.minimum(20.0, process.noise_ratio(process.t_max)))
    )

    def generate(params: Any, key: Any, n: int, label: Any) -> jax.Array:
        x = process.sigma(top) * jax.random.normal(key, (n, *data.spec.shape))
        return model.denoise(params, label)(x, jnp.full(n, top))

    def fake_loss(fake: Any, generator: Any, key: Any, batch: Any) -> Any:
        key_z, key_loss = jax.random.split(key)
        label = labels(data, batch)
        x = stop_gradient(generate(generator, key_z, len(batch["x"]), label))
        times = gd.edm_times(process, mean=teacher.config.noise_mean, std=teacher.config.noise_std)
        losses, _ = gd.denoising_score_matching(
            model.denoise(fake, label), key_loss, x, process=process, weighting="edm",
            times=times, sigma_data=model.sigma_data,
        )  # fmt: skip
        return losses / x[0].size, {}

    def generator_loss(fake: Any, generator: Any, key: Any, batch: Any) -> Any:
        key_z, key_time, key_loss = jax.random.split(key, 3)
        label, n = labels(data, batch), len(batch["x"])
        x = generate(generator, key_z, n, label)
        t = gd.edm_times(process, mean=0.0, std=1.5)(key_time, n)
        real, own = (model.denoise(p, label) for p in (teacher.params, fake))
        losses, aux = gd.distribution_matching_loss(real, own, key_loss, x, process=process, t=t)
        return losses / x[0].size, {"gradient_norm": aux["gradient_norm"]}

    def sample(params: Any, key: Any, n: int, label: Any = None) -> jax.Array:
        return scaling.to_levels(generate(params, key, n, as_labels(label)) + model.shift)

    init = lambda key: {"critic": teacher.params, "generator": teacher.params}  # noqa: E731
    pair = (adam(config, 5), adam(config))
    system = System(init, (fake_loss, generator_loss), pair, sample, labels=asked(data))
    return system._replace(step_options={"n_critic": 5})


def denoiser_of(teacher: Teacher, data: Data, label: Any) -> Callable[..., jax.Array]:
    """E[x_0 | x, sigma] of the teacher for data that are not shifted."""
    denoise = in_clock(
        teacher.model.denoise(teacher.params, label), teacher.model.process, gd.EDM()
    )
    shift = teacher.model.shift
    return lambda x, sigma: denoise(x - shift, sigma) + shift


def labels(data: Data, batch: Any) -> Any:
    """The teacher's models take the labels wherever the data have some."""
    return None if data.spec.classes is None else batch["label"]


def as_labels(label: Any) -> Any:
    return None if label is None else jnp.asarray(label)


def asked(data: Data) -> Any:
    return None if data.spec.classes is None else data.labels()


def adam(config: Any, updates: int = 1) -> optax.GradientTransformation:
    """Adam with a rate that falls along a cosine; `updates` of it in one step."""
    rate = optax.cosine_decay_schedule(config.learning_rate, updates * config.steps, 0.01)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
