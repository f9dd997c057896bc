"""Points moved onto others by the Sinkhorn divergence, in a loop of optax."""

import jax
import jax.numpy as jnp
import optax

from genjax.transport import sinkhorn_divergence


def main(num_steps: int = 60) -> float:
    key_x, key_y = jax.random.split(jax.random.key(0))
    y = jax.random.normal(key_y, (48, 2)) + jnp.array([[4.0, 0.0]])
    x = jax.random.normal(key_x, (48, 2))
    optimizer = optax.adam(0.2)
    state = optimizer.init(x)

    @jax.jit
    def step(x: jax.Array, state: optax.OptState) -> tuple:
        value, grad = jax.value_and_grad(lambda x: sinkhorn_divergence(x, y, epsilon=0.1).value)(x)
        updates, state = optimizer.update(grad, state)
        return optax.apply_updates(x, updates), state, value

    for _ in range(num_steps):
        x, state, value = step(x, state)
    print(f"divergence: {value:.4f}, 16 and more at the start")
    return float(value)


if __name__ == "__main__":
    main()
