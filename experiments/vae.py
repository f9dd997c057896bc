"""Variational autoencoder of images, with the likelihood of whole grey levels.

The prior is N(0, I), q(z|x) a diagonal Gaussian, p(x|z) independent over pixels: a mixture of
discretised logistics, or a categorical law over the levels. Two objectives:

    elbo                  E_q log p(x|z) - beta KL(q(z|x) || p(z))          (beta 1: the VAE)
    iwae                  log 1/K sum_k p(x, z_k) / q(z_k|x), K = num_samples

    python -m experiments.vae
    python -m experiments.vae --beta 4
    python -m experiments.vae --objective iwae --num-samples 8 --estimator dreg
    python -m experiments.vae --latent-dim 2                  (the latent map is the latent space)
    python -m experiments.vae --dataset mnist --network conv --steps 20000 --weight-decay 0.01

Whatever the objective, the test split is scored by the ELBO and by the importance weighted bound
with many samples, in nats and in bits per dimension, beside probabilistic PCA. The run folder
gets summary.json, metrics.jsonl, checkpoints and four pictures: samples, reconstructions,
interpolation, latent_map.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run, _samples, ppca
from genjax import checks
from genjax.data import DataSpec, Scaling, load
from genjax.metrics import Likelihood, test_log_likelihood
from genjax.networks import ConvDecoder, ConvEncoder, ResidualMLP
from genjax.training import export_npz, init_state, make_train_step, shard_batch
from genjax.variational import (
    categorical_log_likelihood,
    elbo,
    gaussian_sample,
    iwae,
    logistic_mixture_log_likelihood,
    ppca_fit,
    ppca_posterior,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Train a variational autoencoder and measure it on the test split."""

    objective: Literal["elbo", "iwae"] = "elbo"
    """The bound that is maximised, see above."""
    num_samples: int = 1
    """Samples of z for each example in training."""
    beta: float = 1.0
    """Weight of the divergence (beta-VAE); with iwae it must be 1."""
    estimator: Literal["plain", "dreg", "stl"] = "plain"
    """Gradient of the encoder under iwae: of the bound itself, doubly reparameterised, or without
    the score of q."""
    likelihood: Literal["mixture", "categorical"] = "mixture"
    """p(x|z) of one pixel: a mixture of discretised logistics, or one probability per level."""
    components: int = 3
    """Logistics in the mixture."""
    latent_dim: int = 16
    """Dimensions of z."""
    network: Literal["mlp", "conv"] = "mlp"
    """Fully connected, or convolutional: two halvings of the image, and back."""
    width: int = 256
    """Units of a hidden layer; of the wider convolution, a quarter of it."""
    depth: int = 2
    """Hidden layers of encoder and of decoder (mlp)."""
    dropout: float = 0.2
    """Share of hidden units dropped in training: 1,437 digits are soon learnt by heart."""
    learning_rate: float = 2e-3
    """AdamW's rate, falling along a cosine to nothing at the last step."""
    weight_decay: float = 1e-4
    """AdamW's decay of the matrices."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    ema: float = 0.99
    """Decay of the averaged weights, which are the ones that are reported."""
    steps: int = 3000
    """Updates in all, those before a resume included."""
    steps_per_call: int = 50
    """Updates in one call of the compiled program."""
    test_samples: int = 512
    """K of the importance weighted bound on the test split, best a multiple of 32."""
    ppca_components: int = 30
    """Components of the PPCA baseline."""


class Model(NamedTuple):
    """The two networks as functions of their parameters; `key` is for dropout, None without it."""

    init: Callable[[jax.Array], Any]
    encode: Callable[..., tuple[jax.Array, jax.Array]]  # (params, x, key) -> mean, log variance
    decode: Callable[..., jax.Array]  # (params, z, key) -> raw numbers [batch, *event, numbers]
    log_likelihood: Callable[[jax.Array, jax.Array], jax.Array]  # (x, raw) -> [batch], nats


def main(config: Config) -> dict[str, Any]:
    """Train, evaluate, draw; returns the summary."""
    check(config)
    train, spec = load(config.dataset, "train", data_dir=config.data_dir)
    test, _ = load(config.dataset, "test", data_dir=config.data_dir)
    model = build(config, spec)
    loss_fn = make_loss(config, model)
    key_init, key_run, key_test, key_draw = jax.random.split(jax.random.key(config.seed), 4)
    optimizer = make_optimizer(config)
    state = init_state(jax.jit(model.init)(key_init), optimizer, key_run, ema_decays=(config.ema,))
    evaluate = make_evaluate(config, model, test["x"])
    mesh, batches = _run.mesh(config), _run.batches(config, train)
    shard_batch(mesh, batches(0))  # a batch that does not fit is refused before a file is written

    def validate(state: Any) -> dict[str, Any]:
        return {"bound": evaluate(state.ema_params(config.ema), key_test).log_likelihood}

    with _run.start_run(config) as run:
        step_fn = make_train_step(
            loss_fn, optimizer, mesh=mesh, steps_per_call=config.steps_per_call
        )
        state = _run.fit(
            run,
            state,
            step_fn,
            batches,
            evaluate=lambda s: {
                "bound": evaluate(s.ema_params(config.ema), key_test).log_likelihood
            },
        )
        params = state.ema_params(config.ema)
        export_npz(run.folder / "params.npz", params)
        draw_pictures(run.folder, model, params, spec, test, key_draw)
        count = _samples.sample_count(train, spec)
        sample = jax.jit(lambda params, key: draw(model, params, key, spec, count))
        _, cost = _samples.save_samples(run, lambda: sample(params, key_draw), evaluations=1)

        bound = evaluate(params, key_test)
        likelihood = evaluate(params, key_test, config.test_samples)
        raw = evaluate(state.params, key_test, config.test_samples)
        baseline = ppca.evaluate(
            *ppca.fit(train["x"], spec, config.ppca_components, config.seed), test["x"], config.seed
        )
        return _run.finish(
            run,
            {
                "objective": config.objective,
                "parameters": _samples.parameter_count(params),
                **cost,
                "test_bound": bound.log_likelihood,
                "test_iwae": likelihood.log_likelihood,
                "test_iwae_standard_error": likelihood.standard_error,
                "iwae_samples": config.test_samples,
                "bits_per_dim": likelihood.bits_per_dim,
                "bits_per_dim_bound": bound.bits_per_dim,
                "bits_per_dim_without_averaging": raw.bits_per_dim,
                "bits_per_dim_ppca": baseline.bits_per_dim,
                "ppca_components": config.ppca_components,
            },
        )


def check(config: Config) -> None:
    """Raise ValueError for options that make no model."""
    for name in ("num_samples", "components", "latent_dim", "width", "depth", "test_samples"):
        checks.integer(name, getattr(config, name), 1)
    checks.at_least("beta", config.beta, 0)
    checks.between("dropout", config.dropout, 0, 0.99)
    if config.objective == "iwae" and config.beta != 1:
        raise ValueError(f"beta must be 1 with objective iwae, got {config.beta}")


def build(config: Config, spec: DataSpec) -> Model:
    """Encoder, decoder and likelihood for images of the data set."""
    if spec.levels is None:
        raise ValueError(f"dataset must be of images, got {spec.name!r}, which has no levels")
    event, latent, levels = tuple(spec.shape), config.latent_dim, spec.levels
    numbers = levels if config.likelihood == "categorical" else 3 * config.components
    scaling = Scaling(levels)
    if config.network == "conv":
        wide, narrow = config.width // 4, config.width // 8
        encoder = ConvEncoder(2 * latent, channels=(narrow, wide), dropout=config.dropout)
        shape = (*event[:2], event[2] * numbers)
        decoder = ConvDecoder(shape, channels=(wide, narrow), dropout=config.dropout)
    else:
        hidden = {"width": config.width, "depth": config.depth, "dropout": config.dropout}
        encoder = ResidualMLP(features=2 * latent, **hidden)
        decoder = ResidualMLP(features=math.prod(event) * numbers, **hidden)

    def init(key: jax.Array) -> Any:
        key_e, key_d = jax.random.split(key)
        x = jnp.zeros((1, *event) if config.network == "conv" else (1, math.prod(event)))
        z = jnp.zeros((1, latent))
        return {"encoder": encoder.init(key_e, x), "decoder": decoder.init(key_d, z)}

    def encode(params: Any, x: jax.Array, key: Any = None) -> tuple[jax.Array, jax.Array]:
        y = scaling.to_continuous(x.astype(jnp.int32))
        y = y if config.network == "conv" else y.reshape(len(x), -1)
        mean, log_var = jnp.split(encoder.apply(params["encoder"], y, dropout_key=key), 2, axis=1)
        return mean, log_var

    def decode(params: Any, z: jax.Array, key: Any = None) -> jax.Array:
        raw = decoder.apply(params["decoder"], z, dropout_key=key)
        return raw.reshape(len(z), *event, numbers)

    def log_likelihood(x: jax.Array, raw: jax.Array) -> jax.Array:
        x = x.astype(jnp.int32)
        if config.likelihood == "categorical":
            return categorical_log_likelihood(x, raw)
        logits, means, log_scales = jnp.split(raw, 3, axis=-1)
        # At the start the components are spread over the levels, each a few levels wide.
        start = jnp.linspace(-1, 1, config.components) if config.components > 1 else jnp.zeros(1)
        means = means + jnp.broadcast_to(start, means.shape)
        # A seventh of a level is as sure as a pixel of the training set may make the model.
        log_scales = jnp.maximum(log_scales - 2, -math.log(levels) - 2)
        return logistic_mixture_log_likelihood(x, logits, means, log_scales, levels=levels)

    return Model(init, encode, decode, log_likelihood)


def make_loss(config: Config, model: Model) -> Callable[..., Any]:
    """The objective as loss(params, key, batch) -> (losses, aux)."""

    def loss_fn(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_z, key_e, key_d = jax.random.split(key, 3)

        def encode(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return model.encode(params, x, key_e)

        def log_likelihood(x: jax.Array, z: jax.Array) -> jax.Array:
            return model.log_likelihood(x, model.decode(params, z, key_d))

        samples = {"num_samples": config.num_samples}
        if config.objective == "elbo":
            return elbo(encode, log_likelihood, key_z, batch["x"], beta=config.beta, **samples)
        options = {"estimator": config.estimator, **samples}
        return iwae(encode, log_likelihood, key_z, batch["x"], **options)

    return loss_fn


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with clipped gradients and a rate that falls along a cosine."""
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay, mask=matrices),
    )


def make_evaluate(config: Config, model: Model, x: np.ndarray) -> Callable[..., Likelihood]:
    """Score the test images: evaluate(params, key) the ELBO, with `samples` the IWAE bound."""

    def score(params: Any, key: jax.Array, samples: int = 0) -> Likelihood:
        def encode(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return model.encode(params, x)

        def log_likelihood(x: jax.Array, z: jax.Array) -> jax.Array:
            return model.log_likelihood(x, model.decode(params, z))

        # So many samples at once, and the rest one after another, to bound the memory.
        chunk = math.gcd(samples, 32) if samples >= 32 else samples

        def log_prob(key: jax.Array, x: jax.Array) -> jax.Array:
            if samples:
                return -iwae(encode, log_likelihood, key, x, num_samples=chunk)[0]
            return -elbo(encode, log_likelihood, key, x, num_samples=8)[0]

        return test_log_likelihood(
            log_prob,
            key,
            jnp.asarray(x, jnp.float32),
            batch_size=120,
            num_draws=samples // chunk if samples else 1,
            estimator="importance" if samples else "bound",
        )

    return jax.jit(score, static_argnums=2)


def level_log_probs(model: Model, params: Any, z: jax.Array, levels: int) -> jax.Array:
    """log p of every level of every pixel given z: [levels, batch, *event]."""
    raw = model.decode(params, z)
    pixels = raw.reshape(-1, raw.shape[-1])
    each = lambda v: model.log_likelihood(jnp.full(len(pixels), v), pixels)  # noqa: E731
    return jax.lax.map(each, jnp.arange(levels)).reshape(levels, *raw.shape[:-1])


def draw(model: Model, params: Any, key: jax.Array, spec: DataSpec, count: int) -> jax.Array:
    """Samples of the model, uint8 [count, *event], a hundred at a time: memory for the levels."""
    latent = jax.eval_shape(model.encode, params, jnp.zeros((1, *spec.shape)))[0].shape[1]

    def hundred(key: jax.Array) -> jax.Array:
        key_z, key_x = jax.random.split(key)
        log_probs = level_log_probs(
            model, params, jax.random.normal(key_z, (100, latent)), spec.levels or 0
        )
        return jax.random.categorical(key_x, log_probs, axis=0).astype(jnp.uint8)

    images = jax.lax.map(hundred, jax.random.split(key, -(-count // 100)))
    return images.reshape(-1, *spec.shape)[:count]


def draw_pictures(
    folder: Any, model: Model, params: Any, spec: DataSpec, test: Any, key: jax.Array
) -> None:
    """Write samples, reconstructions, interpolation and the latent map."""
    levels = spec.levels or 0

    log_probs = jax.jit(lambda z: level_log_probs(model, params, z, levels))

    def expected(z: jax.Array) -> np.ndarray:
        return np.tensordot(np.arange(levels), np.exp(log_probs(z)), axes=1)

    encode = jax.jit(lambda x: model.encode(params, x))
    save = lambda name, images, columns: _pictures.save_grid(  # noqa: E731
        folder / f"{name}.png", images, high=levels - 1, columns=columns
    )
    key_z, key_x, key_q = jax.random.split(key, 3)
    x, latent = test["x"], encode(test["x"][:1])[0].shape[1]

    z = jax.random.normal(key_z, (100, latent))
    save("samples", np.asarray(jax.random.categorical(key_x, log_probs(z), axis=0)), 10)

    # Rows of images above rows of what is expected from one sample of their codes.
    z = gaussian_sample(key_q, *encode(x[:40]))
    rows = np.stack([x[:40].reshape(4, 10, *spec.shape), expected(z).reshape(4, 10, *spec.shape)])
    save("reconstructions", rows.swapaxes(0, 1).reshape(-1, *spec.shape), 10)

    # Straight lines between the codes of pairs of test images.
    mean, _ = encode(x[:20])
    share = jnp.linspace(0, 1, 10)[None, :, None]
    line = (1 - share) * mean[:10, None] + share * mean[10:, None]
    save("interpolation", expected(line.reshape(-1, latent)), 10)

    # Codes of the test images: two dimensions as they are, more by their two main directions.
    codes, _ = encode(x)
    if latent > 2:
        codes, _ = ppca_posterior(ppca_fit(codes, 2), codes)

    def draw(axes: Any) -> None:
        labels = test.get("label")
        points = axes[0].scatter(*np.asarray(codes).T, s=6, c=labels, cmap="tab10")
        axes[0].set(title="codes of the test images", aspect="equal")
        if labels is not None:
            axes[0].legend(*points.legend_elements(), fontsize="x-small", loc="upper right")

    _pictures.save_figure(folder / "latent_map.png", draw, size=5)


if __name__ == "__main__":
    _run.launch(main, Config)
