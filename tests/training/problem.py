"""A small noisy regression that the tests of training share."""

import jax
import jax.numpy as jnp
import numpy as np

DIM, HIDDEN, BATCH = 5, 7, 16


def make_params(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)

    return {
        "in": {"w": normal(DIM, HIDDEN), "b": normal(HIDDEN)},
        "out": {"w": normal(HIDDEN, 1), "b": normal(1)},
    }


def predict(params, x):
    hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"][None])
    return (hidden @ params["out"]["w"] + params["out"]["b"][None])[:, 0]


def plain_loss(params, key, batch):
    """Squared error of each example; no randomness."""
    error = predict(params, batch["x"]) - batch["y"]
    return jnp.square(error), {"absolute": jnp.abs(error)}


def noisy_loss(params, key, batch):
    """The same with noise on the inputs, drawn from the one key for the whole batch."""
    noise = 0.3 * jax.random.normal(key, batch["x"].shape, batch["x"].dtype)
    return plain_loss(params, key, {**batch, "x": batch["x"] + noise})


def make_batch(step, seed=0, size=BATCH):
    rng = np.random.default_rng([seed, step])
    x = rng.normal(size=(size, DIM)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1)).astype(np.float32)}


def stack(batches):
    return jax.tree.map(lambda *x: np.stack(x), *batches)
