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
from genjax.numerics import event_norm, expand_to, sum_event
from genjax.typing import DenoiserFn

Operator = Callable[[Array], Array]
# Draws 0, 1, ... belong to the wrapped step.
REPLACEMENT_DRAW = 1 << 16


def replacement(
    known: Float[Array, "batch *event"],
    mask: Bool[Array, "batch *event"],
    *,
    step: StepFn = heun_step,
) -> StepFn:
    """Inpainting: after each step overwrite the known part with alpha_s known + sigma_s z.

    Song et al. 2021, App. I. The unknown part sees the known one only through the denoiser at the
    next step, so the law is biased (towards the unconditional one) at any number of steps.
    """
    checks.same_shape(known=known, mask=mask)

    def replaced(denoise: DenoiseAt, x: Array, move: Move, /) -> tuple[Array, Array]:
        checks.shape("x", x, known.shape)
        moved, denoised = step(denoise, x, move)
        noise = move.draw(REPLACEMENT_DRAW)
        noised = move.process.alpha(move.s) * known + move.process.sigma(move.s) * noise
        return jnp.where(mask, noised, moved), jnp.where(mask, known, denoised)

    return replaced


def posterior_sampling(
    operator: Operator,
    observation: Float[Array, "batch *observed"],
    *,
    step: StepFn = heun_step,
    scale: Scalar = 0.5,
) -> StepFn:
    """DPS: x_s - scale / |r| grad_x |r|^2 after each step, r = y - A(D(x_t, t)).

    Chung et al. 2023, Algorithm 1 (their zeta'); the gradient passes through the denoiser. The
    operator need not be linear. `scale` is a step size, to be tuned: the law is approximate.
    """
    checks.positive("scale", scale)

    def guided(denoise: DenoiseAt, x: Array, move: Move, /) -> tuple[Array, Array]:
        def misfit(x: Array) -> Array:
            residual = observation - operator(denoise(x, move.t))
            return jnp.sum(event_norm(residual))

        # grad |r|^2 / |r| = 2 grad |r|.
        gradient = 2 * jax.grad(misfit)(x)
        moved, denoised = step(denoise, x, move)
        return moved - scale * gradient, denoised

    return guided


def pseudoinverse_guidance(
    denoise: DenoiserFn,
    operator: Operator,
    observation: Float[Array, "batch *observed"],
    *,
    process: Process,
    noise_std: Scalar = 0.0,
    data_std: Scalar = 1.0,
    covariance: str = "isotropic",
    solver_steps: int = 16,
) -> DenoiserFn:
    """PiGDM: the denoiser of the posterior where Cov[x_0 | x_t] is taken to be C_t.

    D + sigma^2 / alpha J^T A^T (A C_t A^T + noise_std^2 I)^-1 (y - A D), J = dD/dx_t, for a linear
    A (Song et al. 2023, eqs 7-8). "isotropic": C_t = r^2 I with 1 / r^2 = 1 / data_std^2 + (alpha /
    sigma)^2, exact for data N(m, data_std^2 I); "tweedie": C_t = sigma^2 / alpha J, exact for any
    Gaussian data and the exact denoiser, at one product with J per solver step. The system is
    solved by `solver_steps` conjugate gradient steps, example by example.
    """
    checks.one_of("covariance", covariance, ["isotropic", "tweedie"])
    checks.at_least("noise_std", noise_std, 0)
    checks.positive("data_std", data_std)
    checks.integer("solver_steps", solver_steps, 1)

    def guided(x: Array, t: Array) -> Array:
        mean, push = jax.linearize(lambda x: denoise(x, t), x)
        pull = jax.linear_transpose(push, x)
        adjoint = jax.linear_transpose(operator, mean)
        gain = expand_to(process.variance(t) / process.alpha(t), x)
        ratio = process.noise_ratio(t)
        spread = expand_to(data_std**2 * ratio**2 / (data_std**2 + ratio**2), x)

        def system(v: Array) -> Array:
            (image,) = adjoint(v)
            image = spread * image if covariance == "isotropic" else gain * push(image)
            return operator(image) + noise_std**2 * v

        solved = _conjugate_gradient(system, observation - operator(mean), solver_steps)
        (gradient,) = pull(adjoint(solved)[0])
        return mean + gain * gradient

    return guided


def _conjugate_gradient(system: Operator, target: Array, num_steps: int) -> Array:
    """Solve system(v) = target for each example; a solved example stays as it is."""

    def body(_: Array, state: tuple) -> tuple:
        v, residual, direction, square = state
        image = system(direction)
        curvature = sum_event(direction * image)
        usable = (curvature > 0) & (square > 0)
        size = jnp.where(usable, square / jnp.where(usable, curvature, 1.0), 0.0)
        v = v + expand_to(size, v) * direction
        residual = residual - expand_to(size, v) * image
        new = sum_event(jnp.square(residual))
        turn = jnp.where(usable, new / jnp.where(usable, square, 1.0), 0.0)
        direction = residual + expand_to(turn, v) * direction
        return v, residual, direction, jnp.where(usable, new, 0.0)

    start = (jnp.zeros_like(target), target, target, sum_event(jnp.square(target)))
    return jax.lax.fori_loop(0, num_steps, body, start)[0]
