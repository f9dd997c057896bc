"""The figures of choices.md: python docs/choices.py, a minute on a CPU."""

import time

import jax
import jax.numpy as jnp

from genjax import diffusion as gd
from genjax.transport import gaussian_wasserstein, sinkhorn_divergence
from genjax.variational import elbo, gaussian_log_likelihood, iwae


def epsilons() -> None:
    """Sinkhorn divergence of two Gaussian clouds, and how long value and gradient take."""
    key_x, key_y = jax.random.split(jax.random.key(0))
    shift, scale = jnp.array([2.0, 0.0]), 1.5
    x = jax.random.normal(key_x, (8, 512, 2))
    y = shift[None, None] + scale * jax.random.normal(key_y, (8, 512, 2))
    truth = gaussian_wasserstein(jnp.zeros(2), jnp.eye(2), shift, scale**2 * jnp.eye(2))
    print(
        f"| epsilon / mean cost | divergence (truth {truth:.3f}) | spread | ms |\n|---|---|---|---|"
    )
    for share in (1.0, 0.3, 0.1, 0.03, 0.01, 0.001):
        epsilon = share * float(jnp.mean(jnp.sum((x[0][:, None] - y[0][None]) ** 2, -1)))
        run = jax.jit(jax.value_and_grad(
            lambda x, y: sinkhorn_divergence(x, y, epsilon=epsilon).value))  # noqa: B023 # fmt: skip
        values = jnp.array([run(a, b)[0] for a, b in zip(x, y, strict=True)])
        begun = time.perf_counter()
        for a, b in zip(x, y, strict=True):
            jax.block_until_ready(run(a, b))
        ms = 1e3 * (time.perf_counter() - begun) / len(x)
        print(f"| {share} | {values.mean():.3f} | {values.std():.3f} | {ms:.1f} |")


def samplers() -> None:
    """The two modes of a mixture by an exact denoiser: how far the law's moments are off."""
    means, spread = jnp.array([-1.0, 1.0]), 0.2

    def denoiser(x: jax.Array, sigma: jax.Array) -> jax.Array:
        variance = jnp.square(sigma)[:, None]
        total = spread**2 + variance
        weights = jax.nn.softmax(-jnp.square(x - means[None]) / (2 * total), axis=1)
        return jnp.sum(weights * (spread**2 * x + variance * means[None]) / total, 1, keepdims=True)

    process, steps = gd.EDM(), {
        "euler": (gd.euler_step, 1), "ddim": (gd.ddim_step, 1), "heun": (gd.heun_step, 2),
        "dpm_solver": (gd.dpm_solver_step, 1), "unipc": (gd.unipc_step, 1),
        "euler_maruyama": (gd.euler_maruyama_step, 1),
    }  # fmt: skip
    key, truth = jax.random.key(0), None
    print("| sampler | " + " | ".join(f"{n} evaluations" for n in (8, 16, 32, 64)) + " |")
    print("|---|---|---|---|---|")

    def quantiles(step: gd.StepFn, num: int) -> jax.Array:
        draw = jax.jit(lambda k: gd.sample(
            denoiser, k, (20_000, 1), times=gd.time_grid(process, num), step=step, process=process,
        ))  # fmt: skip
        return jnp.quantile(draw(key), jnp.linspace(0.02, 0.98, 49))

    truth = quantiles(gd.heun_step, 400)
    for name, (step, cost) in steps.items():
        errors = [jnp.abs(quantiles(step, n // cost) - truth).mean() for n in (8, 16, 32, 64)]
        print(f"| {name} | " + " | ".join(f"{e:.4f}" for e in errors) + " |")


def bounds() -> None:
    """A linear Gaussian model under an encoder that is too narrow: nats below log p(x)."""
    dim, latent = 16, 4
    keys = jax.random.split(jax.random.key(0), 4)
    w = jax.random.normal(keys[0], (latent, dim)) / 2
    z = jax.random.normal(keys[1], (512, latent))
    x = z @ w + 0.5 * jax.random.normal(keys[2], (512, dim))
    precision = jnp.eye(latent) + w @ w.T / 0.25
    mean = x @ w.T @ jnp.linalg.inv(precision) / 0.25
    log_var = jnp.log(0.3 * jnp.diag(jnp.linalg.inv(precision)))
    encode = lambda x: (mean, jnp.broadcast_to(log_var, mean.shape))  # noqa: E731
    likelihood = lambda x, z: gaussian_log_likelihood(x, z @ w, 2 * jnp.log(0.5))  # noqa: E731
    covariance = w.T @ w + 0.25 * jnp.eye(dim)
    exact = jax.scipy.stats.multivariate_normal.logpdf(x, jnp.zeros(dim), covariance).mean()
    print(f"| bound | nats below log p(x) = {exact:.3f} |\n|---|---|")
    run = jax.jit(lambda k: elbo(encode, likelihood, k, x, num_samples=64)[0].mean())
    print(f"| ELBO | {exact + run(keys[3]):.3f} |")
    for k in (5, 50, 500):
        run = jax.jit(lambda key, k=k: iwae(encode, likelihood, key, x, num_samples=k)[0].mean())
        print(f"| IWAE, {k} samples | {exact + run(keys[3]):.3f} |")


if __name__ == "__main__":
    epsilons()
    samplers()
    bounds()
