"""A variational autoencoder of Flax NNX modules, trained by `genjax.variational.elbo`."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from genjax.variational import bernoulli_log_likelihood, elbo


class VAE(nnx.Module):
    def __init__(self, dim: int, latent: int, rngs: nnx.Rngs):
        self.encoder = nnx.Linear(dim, 2 * latent, rngs=rngs)
        self.decoder = nnx.Linear(latent, dim, rngs=rngs)

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, log_var = jnp.split(self.encoder(x), 2, axis=-1)
        return mean, log_var


def main(num_steps: int = 300) -> float:
    chance = 0.1 + 0.8 * (jnp.arange(16) % 2)[None]
    x = (jax.random.uniform(jax.random.key(1), (64, 16)) < chance).astype(jnp.float32)
    model = VAE(16, 2, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: VAE, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
        def loss(model: VAE) -> jax.Array:
            likelihood = lambda x, z: bernoulli_log_likelihood(x, model.decoder(z))  # noqa: E731
            return elbo(model.encode, likelihood, key, x)[0].mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    for key in jax.random.split(jax.random.key(0), num_steps):
        value = step(model, optimizer, key)
    print(f"minus the bound: {value:.2f} nats, {16 * jnp.log(2):.2f} for fair coins")
    return float(value)


if __name__ == "__main__":
    main()
