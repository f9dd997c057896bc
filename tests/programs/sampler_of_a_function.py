"""Samples by `genjax.diffusion.sample` from a denoiser that somebody else has: any function."""

import jax
import jax.numpy as jnp

from genjax import diffusion


def denoiser(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """E[x0 | x] of data N(1, 0.5^2) under noise of standard deviation sigma."""
    variance = jnp.square(sigma)[:, None]
    return (0.25 * x + variance) / (0.25 + variance)


def main(num_steps: int = 18) -> float:
    process = diffusion.EDM()
    times = diffusion.time_grid(process, num_steps)
    draw = jax.jit(
        lambda key: diffusion.sample(
            denoiser, key, (4096, 1), times=times, step=diffusion.heun_step, process=process
        )
    )
    x = draw(jax.random.key(0))
    print(f"samples: mean {x.mean():.3f} (1), standard deviation {x.std():.3f} (0.5)")
    return float(x.mean())


if __name__ == "__main__":
    main()
