"""A finished diffusion model distilled into few steps: progressively, or by its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.diffusion.schedules import Process
from genjax.numerics import at_least_float32, expand_to, sum_event
from genjax.typing import DenoiserFn, PRNGKey


def ddim_move(
    process: Process,
    denoised: Float[Array, "batch *event"],
    x_t: Float[Array, "batch *event"],
    t: Float[Array, " batch"],
    s: Float[Array, " batch"],
) -> Float[Array, "batch *event"]:
    """x_s = alpha_s D + sigma_s (x_t - alpha_t D) / sigma_t, with a time for each example.

    DDIM without noise (Song, Meng, Ermon 2021, eq. 12 at eta = 0), D = E[x_0 | x_t].

    >>> x, t = jnp.ones((2, 3)), jnp.full(2, 2.0)
    >>> ddim_move(EDM(), 0 * x, x, t, t / 2)[0]
    Array([0.5, 0.5, 0.5], dtype=float32)
    """
    ratio = expand_to(process.sigma(s) / process.sigma(t), x_t)
    alpha_t, alpha_s = (expand_to(process.alpha(r), x_t) for r in (t, s))
    return alpha_s * denoised + ratio * (x_t - alpha_t * denoised)


def progressive_target(
    teacher: DenoiserFn,
    x_t: Float[Array, "batch *event"],
    t: Float[Array, " batch"],
    s: Float[Array, " batch"],
    *,
    process: Process,
) -> Float[Array, "batch *event"]:
    """The x_0 with which one DDIM step from t to s ends where two of the teacher do.

        x~ = (x'' - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)

    x'': two DDIM steps of half the length in time. Salimans and Ho 2022 (arXiv:2202.00512),
    appendix G. No gradient flows into it. Raises ValueError where concrete times have s >= t.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> x, t = jnp.ones((2, 3)), jnp.full(2, 2.0)
    >>> progressive_target(denoise, x, t, t / 2, process=EDM()).shape
    (2, 3)
    """
    checks.same_batch(x_t=x_t, t=t, s=s)
    if (
        checks.is_concrete(t)
        and checks.is_concrete(s)
        and not np.all(np.asarray(s) < np.asarray(t))
    ):
        raise ValueError("times must fall, s < t: noise is at t_max, data at 0")
    x_t = at_least_float32(x_t)
    middle = (t + s) / 2
    x_m = ddim_move(process, at_least_float32(teacher(x_t, t)), x_t, t, middle)
    end = ddim_move(process, at_least_float32(teacher(x_m, middle)), x_m, middle, s)
    ratio = process.sigma(s) / process.sigma(t)
    scale = expand_to(process.alpha(s) - ratio * process.alpha(t), x_t)
    return stop_gradient((end - expand_to(ratio, x_t) * x_t) / scale)


def progressive_distillation_loss(
    student: DenoiserFn,
    teacher: DenoiserFn,
    key: PRNGKey,
    x: Float[Array, "batch *event"],
    *,
    process: Process,
    num_steps: int | Int[Array, ""],
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """max(SNR, 1) |D_student(x_t) - x~|^2 per example, summed over the event.

    SNR = alpha_t^2 / sigma_t^2, x~ the `progressive_target` of a step of t_max / num_steps from a
    time t on the student's grid of `num_steps` equal steps; the teacher does each in two. Once
    trained, the student is the teacher of one with half the steps; the number may be traced. Both
    are denoisers E[x_0 | x_t]. Salimans and Ho 2022 (arXiv:2202.00512), algorithm 2 and section 4.
    Returns (losses [batch], {"t"}).

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> key, x = jax.random.key(0), jnp.ones((4, 2))
    >>> options = dict(process=VariancePreserving(), num_steps=4)
    >>> progressive_distillation_loss(denoise, denoise, key, x, **options)[0].shape
    (4,)
    """
    if checks.is_concrete(num_steps):
        checks.integer("num_steps", int(num_steps), 1)
    checks.min_rank("x", x, 1)
    x = at_least_float32(x)
    key_time, key_noise = jax.random.split(key)
    place = jax.random.randint(key_time, x.shape[:1], 1, num_steps + 1).astype(x.dtype)
    t_max = jnp.asarray(process.t_max, x.dtype)
    t, s = place / num_steps * t_max, (place - 1) / num_steps * t_max
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x_t = expand_to(alpha, x) * x + expand_to(sigma, x) * noise
    target = progressive_target(teacher, x_t, t, s, process=process)
    squared = sum_event(jnp.square(at_least_float32(student(x_t, t)) - target))
    return jnp.maximum(jnp.square(alpha / sigma), 1.0) * squared, {"t": t}


def distribution_matching_loss(
    real: DenoiserFn,
    fake: DenoiserFn,
    key: PRNGKey,
    x: Float[Array, "batch *event"],
    *,
    process: Process,
    t: Float[Array, " batch"] | None = None,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """|x - sg(x - g)|^2 / 2 per generated example, whose gradient for x is g.

        g = (D_fake(x_t) - D_real(x_t)) / mean |x - D_real(x_t)|

    x are samples of the generator, noised to x_t at uniform times in [0.02, 0.98] t_max unless
    given; D_real is the finished model's denoiser, D_fake one of the generator's own samples, which
    is trained beside it by `denoising_score_matching`. The difference is sigma^2 / alpha times that
    of the scores, so that g descends the KL divergence between the noised laws, 0 where they agree;
    the mean is over the event. Yin et al. 2024 (arXiv:2311.18828), eqs. 7 and 8. Returns (losses
    [batch], {"t", "gradient_norm"}).

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> key, x = jax.random.key(0), jnp.ones((4, 2))
    >>> losses, aux = distribution_matching_loss(denoise, denoise, key, x, process=EDM())
    >>> losses
    Array([0., 0., 0., 0.], dtype=float32)
    """
    checks.min_rank("x", x, 1)
    x = at_least_float32(x)
    key_time, key_noise = jax.random.split(key)
    if t is None:
        share = jax.random.uniform(key_time, x.shape[:1], x.dtype, 0.02, 0.98)
        t = share * jnp.asarray(process.t_max, x.dtype)
    checks.shape("t", t, x.shape[:1])
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    x_t = expand_to(process.alpha(t), x) * x + expand_to(process.sigma(t), x) * noise
    x_t = stop_gradient(x_t)
    of_real, of_fake = (at_least_float32(d(x_t, t)) for d in (real, fake))
    size = sum_event(jnp.abs(x - of_real)) / (x.size / len(x))
    gradient = (of_fake - of_real) / expand_to(jnp.maximum(size, 1e-6), x)
    gradient = stop_gradient(gradient)
    losses = sum_event(jnp.square(x - stop_gradient(x - gradient))) / 2
    return losses, {"t": t, "gradient_norm": jnp.sqrt(sum_event(jnp.square(gradient)))}
