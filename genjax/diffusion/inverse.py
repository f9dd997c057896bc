"""Conditioning after the fact: y = A x_0 + noise, with a denoiser trained on x_0 alone.

`replacement` and `posterior_sampling` wrap a step, `pseudoinverse_guidance` wraps the denoiser;
all are used with `samplers.sample`. The operator A maps [batch, *event] to [batch, *observed].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from genjax import checks
from genjax.diffusion.schedules import Process, Scalar
from genjax.diffusion.steps import DenoiseAt, Move, StepFn, heun_step
from genjax.numerics import event_norm, expand_to, linearize, sum_event
from genjax.typing import DenoiserFn

Operator = Callable[[Array], Array]
# Normals 0, 1, ... of a move belong to the wrapped step.
REPLACEMENT_NOISE = 1 << 16


def replacement(
    known: Float[Array, "batch *event"],
    mask: Bool[Array, "batch *event"],
    *,
    step: StepFn = heun_step,
) -> StepFn:
    """Inpainting: after each step overwrite the known part with alpha_s known + sigma_s z.

    Song et al. 2021, App. I. The unknown part sees the known one only through the denoiser at the
    next step, so the law is biased (towards the unconditional one) at any number of steps.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> step = replacement(jnp.ones((5, 2)), jnp.arange(10).reshape(5, 2) % 2 == 0)
    >>> process = EDM()
    >>> options = dict(process=process, times=time_grid(process, 8), step=step)
    >>> sample(denoise, jax.random.key(0), (5, 2), **options)[:, 0]
    Array([1., 1., 1., 1., 1.], dtype=float32)
    """
    checks.same_shape(known=known, mask=mask)

    def replaced(denoise: DenoiseAt, x: Array, move: Move, /) -> tuple[Array, Array]:
        checks.shape("x", x, known.shape)
        moved, denoised = step(denoise, x, move)
        noise = move.normal(REPLACEMENT_NOISE, x)
        noised = move.process.alpha(move.s) * known + move.process.sigma(move.s) * noise
        return jnp.where(mask, noised, moved), jnp.where(mask, known, denoised)

    return replaced


def posterior_sampling(
    operator: Operator,
    observation: Float[Array, "batch *observed"],
    *,
    step: StepFn = heun_step,
    scale: Scalar | None = None,
    noise_std: Scalar | None = None,
    data_std: Scalar = 1.0,
) -> StepFn:
    """DPS: steps steered down |r|^2, r = y - A(D(x_t, t)), the gradient through the denoiser.

    Without `noise_std`, x_s - scale / |r| grad_x |r|^2 after each step (Chung et al. 2023,
    Algorithm 1; scale, their zeta', 0.5 by default). Such steps have one size at every noise level
    and overshoot where |r| is below it: their scale has to be tuned to data, operator and grid.

    With `noise_std`, the step takes D - scale sigma^2 / alpha grad_x |r|^2 / (2 (noise_std^2 +
    v)), the mean given y where y ~ N(A D, (noise_std^2 + v) I), with 1 / v = 1 / data_std^2 +
    (alpha / sigma)^2 the spread of x_0 around D and scale 1 by default: for data N(m, data_std^2 I)
    and orthonormal rows of A exact, with any step. The operator need not be linear.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> step = posterior_sampling(lambda x: x[:, :1], jnp.ones((5, 1)), scale=0.5)
    >>> process = EDM()
    >>> options = dict(process=process, times=time_grid(process, 8), step=step)
    >>> sample(denoise, jax.random.key(0), (5, 2), **options).shape
    (5, 2)
    """
    scale = (0.5 if noise_std is None else 1.0) if scale is None else scale
    checks.positive("scale", scale)
    checks.positive("data_std", data_std)
    if noise_std is not None:
        checks.at_least("noise_std", noise_std, 0)
    noise_variance = 0.0 if noise_std is None else noise_std**2

    def tilted(denoise: DenoiseAt, x: Array, move: Move, /) -> tuple[Array, Array]:
        process = move.process

        def conditional(x: Array, t: Array) -> Array:
            def misfit(x: Array) -> tuple[Array, Array]:
                mean = denoise(x, t)
                return 0.5 * jnp.sum(jnp.square(observation - operator(mean))), mean

            gradient, mean = jax.grad(misfit, has_aux=True)(x)
            gain = process.variance(t) / process.alpha(t)
            spread = _spread(process, t, data_std) + noise_variance
            # 0 at t = 0 without noise, where the gain is 0 too.
            return mean - scale * gain / jnp.where(spread > 0, spread, 1.0) * gradient

        return step(conditional, x, move)

    def guided(denoise: DenoiseAt, x: Array, move: Move, /) -> tuple[Array, Array]:
        def misfit(x: Array) -> Array:
            residual = observation - operator(denoise(x, move.t))
            return jnp.sum(event_norm(residual))

        # grad |r|^2 / |r| = 2 grad |r|.
        gradient = 2 * jax.grad(misfit)(x)
        moved, denoised = step(denoise, x, move)
        return moved - scale * gradient, denoised

    return guided if noise_std is None else tilted


def _spread(process: Process, t: Array, data_std: Scalar) -> Array:
    """Var[x_0 | x_t] for data N(m, data_std^2)."""
    ratio = process.noise_ratio(t)
    return data_std**2 * ratio**2 / (data_std**2 + ratio**2)


def pseudoinverse_guidance(
    denoise: DenoiserFn,
    operator: Operator,
    observation: Float[Array, "batch *observed"],
    *,
    process: Process,
    noise_std: Scalar = 0.0,
    data_std: Scalar = 1.0,
    covariance: str = "isotropic",
    num_steps: int = 16,
) -> DenoiserFn:
    """PiGDM: the denoiser of the posterior where Cov[x_0 | x_t] is taken to be C_t.

    D + sigma^2 / alpha J^T A^T (A C_t A^T + noise_std^2 I)^-1 (y - A D), J = dD/dx_t, for a linear
    A (Song et al. 2023, eqs 7-8). "isotropic": C_t = r^2 I with 1 / r^2 = 1 / data_std^2 + (alpha /
    sigma)^2, exact for data N(m, data_std^2 I); "tweedie": C_t = sigma^2 / alpha J, exact for any
    Gaussian data and the exact denoiser, at one product with J per solver step. The system is
    solved by `num_steps` steps of conjugate gradients, example by example.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> process, first = EDM(), lambda x: x[:, :1]
    >>> guided = pseudoinverse_guidance(denoise, first, jnp.ones((5, 1)), process=process)
    >>> guided(jnp.zeros((5, 2)), jnp.ones(5)).shape
    (5, 2)
    """
    checks.one_of("covariance", covariance, ["isotropic", "tweedie"])
    checks.at_least("noise_std", noise_std, 0)
    checks.positive("data_std", data_std)
    checks.integer("num_steps", num_steps, 1)

    def guided(x: Array, t: Array) -> Array:
        mean, push = linearize(lambda x: denoise(x, t), x)
        pull = jax.linear_transpose(push, x)
        adjoint = jax.linear_transpose(operator, mean)
        gain = expand_to(process.variance(t) / process.alpha(t), x)
        spread = expand_to(_spread(process, t, data_std), x)

        def system(v: Array) -> Array:
            (image,) = adjoint(v)
            image = spread * image if covariance == "isotropic" else gain * push(image)
            return operator(image) + noise_std**2 * v

        solved = _conjugate_gradient(system, observation - operator(mean), num_steps)
        (gradient,) = pull(adjoint(solved)[0])
        return mean + gain * gradient

    return guided


def _conjugate_gradient(system: Operator, target: Array, num_steps: int) -> Array:
    """Solve system(v) = target for each example; one solved to rounding stays as it is."""
    whole = sum_event(jnp.square(target))
    rounding = jnp.finfo(whole.dtype).eps ** 2 * jax.lax.stop_gradient(whole)

    def body(_: Array, state: tuple) -> tuple:
        v, residual, direction, square = state
        image = system(direction)
        curvature = sum_event(direction * image)
        usable = (curvature > 0) & (square > rounding)
        size = jnp.where(usable, square / jnp.where(usable, curvature, 1.0), 0.0)
        v = v + expand_to(size, v) * direction
        residual = residual - expand_to(size, v) * image
        new = sum_event(jnp.square(residual))
        turn = jnp.where(usable, new / jnp.where(usable, square, 1.0), 0.0)
        direction = residual + expand_to(turn, v) * direction
        return v, residual, direction, jnp.where(usable, new, 0.0)

    start = (jnp.zeros_like(target), target, target, whole)
    return jax.lax.fori_loop(0, num_steps, body, start)[0]
