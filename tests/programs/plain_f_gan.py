"""A GAN of plain dictionaries under an f-divergence, the critic held by a gradient penalty."""

import jax
import jax.numpy as jnp

from genjax.adversarial import f_gan, r1_penalty

Params = dict[str, jax.Array]


def critic(params: Params, x: jax.Array) -> jax.Array:
    return (jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"])[:, 0]


def generator(params: Params, z: jax.Array) -> jax.Array:
    return params["mean"][None] + z * params["scale"][None]


def main(num_steps: int = 600) -> float:
    keys = jax.random.split(jax.random.key(0), 3)
    d = {
        "w": jax.random.normal(keys[0], (1, 16)),
        "b": jnp.zeros(16),
        "v": 0.1 * jax.random.normal(keys[1], (16, 1)),
    }
    g = {"mean": jnp.zeros(1), "scale": jnp.ones(1)}

    def losses(d: Params, g: Params, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_x, key_z = jax.random.split(key)
        real = 2 + jax.random.normal(key_x, (128, 1))
        fake = generator(g, jax.random.normal(key_z, (128, 1)))
        found = f_gan("jensen_shannon", critic(d, real), critic(d, fake))
        penalty = 0.1 * r1_penalty(lambda x: critic(d, x), real).mean()
        return found.critic + penalty, found.generator

    @jax.jit
    def step(d: Params, g: Params, key: jax.Array) -> tuple[Params, Params]:
        of_d = jax.grad(lambda d: losses(d, g, key)[0])(d)
        of_g = jax.grad(lambda g: losses(d, g, key)[1])(g)
        move = lambda p, grad: p - 0.05 * grad  # noqa: E731
        return jax.tree.map(move, d, of_d), jax.tree.map(move, g, of_g)

    for key in jax.random.split(keys[2], num_steps):
        d, g = step(d, g, key)
    print(f"mean of the generator: {g['mean'][0]:.2f} (2)")
    return float(g["mean"][0])


if __name__ == "__main__":
    main()
