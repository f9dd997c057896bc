"""Flow matching of an Equinox network: `genjax.flows.flow_matching_loss` and `integrate`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from genjax import flows


class Velocity(eqx.Module):
    net: eqx.nn.MLP

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return jax.vmap(self.net)(jnp.concatenate([x, t[:, None]], axis=1))


def main(num_steps: int = 400) -> float:
    target = 3 + 0.5 * jax.random.normal(jax.random.key(1), (256, 2))
    model = Velocity(eqx.nn.MLP(3, 2, 32, 2, key=jax.random.key(2)))
    optimizer = optax.adam(3e-3)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model: Velocity, state: optax.OptState, key: jax.Array) -> tuple:
        def loss(model: Velocity) -> jax.Array:
            key_noise, key_time = jax.random.split(key)
            noise = jax.random.normal(key_noise, target.shape)
            return flows.flow_matching_loss(model, key_time, noise, target)[0].mean()

        grads = eqx.filter_grad(loss)(model)
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(model, updates), state

    for key in jax.random.split(jax.random.key(0), num_steps):
        model, state = step(model, state, key)
    noise = jax.random.normal(jax.random.key(3), (512, 2))
    samples = jax.jit(lambda x: flows.integrate(model, x, num_steps=20))(noise)
    mean, std = jnp.mean(samples), jnp.mean(jnp.std(samples, axis=0))
    print(f"samples: mean {mean:.2f} (3), standard deviation {std:.2f} (0.5)")
    return float(mean)


if __name__ == "__main__":
    main()
