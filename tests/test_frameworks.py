"""One ELBO, four ways to write the network: Flax linen, Flax NNX, Equinox, plain dictionaries.

The same weights go into each; losses and gradients must be the same, compiled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.variational import bernoulli_log_likelihood, elbo, iwae

DIM, LATENT = 6, 2
RNG = np.random.default_rng(0)
X = jnp.array(RNG.uniform(size=(5, DIM)) > 0.5, jnp.float32)
WEIGHTS = {
    "encoder": {"kernel": (DIM, 2 * LATENT), "bias": (2 * LATENT,)},
    "decoder": {"kernel": (LATENT, DIM), "bias": (DIM,)},
}
WEIGHTS = {
    part: {name: jnp.array(RNG.normal(size=shape), jnp.float32) for name, shape in sizes.items()}
    for part, sizes in WEIGHTS.items()
}


def plain():
    """params -> (encoder, decoder), both plain callables, and params."""

    def networks(params):
        dense = lambda part: lambda x: x @ part["kernel"] + part["bias"][None]  # noqa: E731
        return dense(params["encoder"]), dense(params["decoder"])

    return networks, WEIGHTS, lambda grads: grads


def linen():
    import flax.linen as nn

    encoder, decoder = nn.Dense(2 * LATENT), nn.Dense(DIM)

    def networks(params):
        return (
            lambda x: encoder.apply({"params": params["encoder"]}, x),
            lambda z: decoder.apply({"params": params["decoder"]}, z),
        )

    return networks, WEIGHTS, lambda grads: grads


def nnx():
    from flax import nnx

    class VAE(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Linear(DIM, 2 * LATENT, rngs=rngs)
            self.decoder = nnx.Linear(LATENT, DIM, rngs=rngs)

    model = VAE(nnx.Rngs(0))
    for part in ("encoder", "decoder"):
        for name in ("kernel", "bias"):
            getattr(getattr(model, part), name).set_value(WEIGHTS[part][name])
    # The bridge: split once, merge inside the loss.
    graph, params = nnx.split(model)

    def networks(params):
        merged = nnx.merge(graph, params)
        return merged.encoder, merged.decoder

    return networks, params, lambda grads: nnx.to_pure_dict(grads)


def equinox():
    import equinox as eqx

    def layer(part):
        rows, columns = WEIGHTS[part]["kernel"].shape
        linear = eqx.nn.Linear(rows, columns, key=jax.random.key(0))
        values = (WEIGHTS[part]["kernel"].T, WEIGHTS[part]["bias"])
        return eqx.tree_at(lambda m: (m.weight, m.bias), linear, values)

    params, static = eqx.partition((layer("encoder"), layer("decoder")), eqx.is_array)

    def networks(params):
        encoder, decoder = eqx.combine(params, static)
        return jax.vmap(encoder), jax.vmap(decoder)

    def read(grads):
        parts = zip(("encoder", "decoder"), grads, strict=True)
        return {part: {"kernel": layer.weight.T, "bias": layer.bias} for part, layer in parts}

    return networks, params, read


def value_and_gradient(framework, bound):
    networks, params, read = framework()

    @jax.jit
    def loss(params, key):
        encoder, decoder = networks(params)
        losses, _ = bound(
            lambda x: tuple(jnp.split(encoder(x), 2, axis=1)),
            lambda x, z: bernoulli_log_likelihood(x, decoder(z)),
            key,
            X,
            num_samples=3,
        )
        return losses.mean()

    value, grads = jax.value_and_grad(loss)(params, jax.random.key(1))
    return value, read(grads)


@pytest.mark.parametrize("bound", [elbo, iwae])
@pytest.mark.parametrize("framework", [linen, nnx, equinox])
def test_every_framework_gives_the_same_bound(framework, bound):
    value, grads = value_and_gradient(framework, bound)
    expected_value, expected_grads = value_and_gradient(plain, bound)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
        assert np.abs(expected).max() > 0
