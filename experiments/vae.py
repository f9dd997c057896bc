"""Variational autoencoder of images, with the likelihood of whole grey levels.

q(z|x) is a diagonal Gaussian, p(x|z) independent over pixels: a mixture of discretised logistics,
or a categorical law over the levels. The prior is N(0, I), or learnt with the rest: a mixture of
Gaussians, the VampPrior, whose components are the encoder's posteriors of trained pseudo-inputs, or
a flow. Two objectives:

    elbo                  E_q log p(x|z) - beta KL(q(z|x) || p(z))          (beta 1: the VAE)
    iwae                  log 1/K sum_k p(x, z_k) / q(z_k|x), K = num_samples

    python -m experiments.vae
    python -m experiments.vae --beta 4
    python -m experiments.vae --prior vamp
    python -m experiments.vae --objective iwae --num-samples 8 --estimator dreg
    python -m experiments.vae --latent-dim 2                  (the latent map is the latent space)
    python -m experiments.vae --dataset mnist --network conv --steps 20000 --weight-decay 0.01

Whatever the objective, the test split is scored by the importance weighted bound with many samples
and by the ELBO, in nats and in bits per dimension, beside probabilistic PCA. The run folder gets
four pictures: samples, reconstructions, interpolation, latent_map.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _judge, _keys, _pictures, _run, ppca
from experiments._data import Data, load_data
from experiments._pixels import PixelLaw, in_hundreds, pixel_law
from experiments._priors import Prior, make_prior
from experiments._system import Row, System, adamw, train
from genjax import checks
from genjax.data import DataSpec, Scaling
from genjax.networks import ConvDecoder, ConvEncoder, ResidualMLP
from genjax.variational import (
    elbo,
    gaussian_sample,
    iwae,
)

ROWS = (
    Row("vae", "VAE", images={}, larger={"test_samples": 128}),
    Row("vae_vamp", "VAE, VampPrior", images={"prior": "vamp"}, larger={"test_samples": 128}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a variational autoencoder and measure it on the test split."""

    evaluation: ClassVar = ("test_samples", "ppca_components")

    objective: Literal["elbo", "iwae"] = "elbo"
    """The bound that is maximised, see above."""
    num_samples: int = 1
    """Samples of z for each example in training."""
    beta: float = 1.0
    """Weight of the divergence (beta-VAE); with iwae it must be 1."""
    estimator: Literal["plain", "dreg", "stl"] = "plain"
    """Gradient of the encoder under iwae: of the bound itself, doubly reparameterised, or without
    the score of q."""
    prior: Literal["standard", "mixture", "vamp", "flow"] = "standard"
    """p(z): N(0, I), a mixture of Gaussians, the VampPrior, or coupling layers."""
    prior_components: int | None = None
    """Gaussians of the mixture (default 64), pseudo-inputs of the VampPrior (500), couplings of the
    flow (6)."""
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
    weight_decay: float = 1e-4
    """AdamW's decay of the matrices."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    ema: float = 0.99
    steps: int = 3000
    steps_per_call: int = 50
    test_samples: int = 512
    """K of the importance weighted bound on the test split, best a multiple of 32."""
    ppca_components: int = 30
    """Components of the PPCA baseline."""


COMPONENTS = {"standard": 1, "mixture": 64, "vamp": 500, "flow": 6}


class Model(NamedTuple):
    """The networks as functions of their parameters; `key` is for dropout, None without it."""

    init: Callable[[jax.Array], Any]
    encode: Callable[..., tuple[jax.Array, jax.Array]]  # (params, x, key) -> mean, log variance
    decode: Callable[..., jax.Array]  # (params, z, key) -> raw numbers [batch, *event, numbers]
    law: PixelLaw  # of x given the raw numbers
    log_prior: Callable[..., Any]  # (params, key) -> a log-density of z, or None for N(0, I)
    draw_prior: Callable[..., jax.Array]  # (params, key, n) -> z

    def log_likelihood(self, x: jax.Array, raw: jax.Array) -> jax.Array:
        """Nats [batch]."""
        return self.law.log_likelihood(x, raw)


def main(config: Config) -> dict[str, Any]:
    """Train, evaluate, draw; returns the summary."""
    check(config)
    data = load_data(config)
    data.require("images")
    model = make_model(config, data.spec, data.train["x"])

    def report(run: _run.Run, params: Any, samples: np.ndarray) -> dict[str, Any]:
        key = jax.random.fold_in(_keys.keys(config.seed).batches, _keys.PICTURES)
        plot_latents(run.folder, model, params, data, key)
        bound = _judge.likelihood(
            system._replace(log_prob=bound_of(model, 0)), data, num_draws=1, estimator="bound"
        )(params, _keys.keys(config.seed).test, data.test)
        linear = ppca.score(data, config.ppca_components, config.seed)
        return {
            "test_bound": bound["test_log_likelihood"],
            "bits_per_dim_bound": bound["bits_per_dim"],
            "bits_per_dim_ppca": linear["bits_per_dim"],
        }

    system = build(config, data)
    return train(config, system, data, report)


def build(config: Config, data: Data) -> System:
    """The model with its objective, scored by the importance weighted bound."""
    check(config)
    data.require("images")
    model = make_model(config, data.spec, data.train["x"])
    # So many samples at once, and the rest one after another, to bound the memory.
    chunk = math.gcd(config.test_samples, 32) if config.test_samples >= 32 else config.test_samples

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        def hundred(key: jax.Array) -> jax.Array:
            key_z, key_x = jax.random.split(key)
            z = model.draw_prior(params, key_z, 100)
            return model.law.sample(key_x, model.decode(params, z))

        return in_hundreds(hundred, key, n)

    return System(
        model.init,
        make_loss(config, model),
        adamw(config, optax.cosine_decay_schedule(config.learning_rate, config.steps)),
        sample,
        bound_of(model, chunk),
        likelihood={
            "batch_size": 120,
            "num_draws": config.test_samples // chunk,
            "estimator": "importance",
        },
    )


def bound_of(model: Model, samples: int) -> Callable[..., jax.Array]:
    """log_prob for `System`: the IWAE bound of so many samples, with 0 the ELBO by eight."""

    def log_prob(params: Any, key: jax.Array, x: jax.Array) -> jax.Array:
        networks = (
            lambda x: model.encode(params, x),
            lambda x, z: model.log_likelihood(x, model.decode(params, z)),
        )
        prior = model.log_prior(params, None)
        if samples:
            return -iwae(*networks, key, x, num_samples=samples, prior=prior)[0]
        return -elbo(*networks, key, x, num_samples=8, prior=prior)[0]

    return log_prob


def check(config: Config) -> None:
    """Raise ValueError for options that make no model."""
    for name in ("num_samples", "components", "latent_dim", "width", "depth", "test_samples"):
        checks.integer(name, getattr(config, name), 1)
    checks.at_least("beta", config.beta, 0)
    checks.between("dropout", config.dropout, 0, 0.99)
    if config.objective == "iwae" and config.beta != 1:
        raise ValueError(f"beta must be 1 with objective iwae, got {config.beta}")
    if config.objective != "iwae" and config.estimator != "plain":
        raise ValueError(f"estimator must be plain without objective iwae, got {config.estimator}")
    if config.network == "conv":
        checks.integer("width of the convolutions", config.width, 8)


def make_model(config: Config, spec: DataSpec, images: Any = ()) -> Model:
    """Encoder, decoder, likelihood and prior for images of the data set.

    images: levels to start the VampPrior's pseudo-inputs at.
    """
    event, latent = tuple(spec.shape), config.latent_dim
    law = pixel_law(config.likelihood, config.components, spec)
    numbers, scaling = law.numbers, Scaling(spec.levels or 0)
    prior = _prior(config, scaling, images)
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
        params = {"encoder": encoder.init(key_e, x), "decoder": decoder.init(key_d, z)}
        if prior is not None:
            params["prior"] = prior.init(jax.random.fold_in(key, 2))
        return params

    def encode_scaled(params: Any, y: jax.Array, key: Any = None) -> tuple[jax.Array, jax.Array]:
        y = y if config.network == "conv" else y.reshape(len(y), -1)
        mean, log_var = jnp.split(encoder.apply(params["encoder"], y, dropout_key=key), 2, axis=1)
        return mean, log_var

    def encode(params: Any, x: jax.Array, key: Any = None) -> tuple[jax.Array, jax.Array]:
        return encode_scaled(params, scaling.to_continuous(x.astype(jnp.int32)), key)

    def decode(params: Any, z: jax.Array, key: Any = None) -> jax.Array:
        raw = decoder.apply(params["decoder"], z, dropout_key=key)
        return raw.reshape(len(z), *event, numbers)

    def log_prior(params: Any, key: Any = None) -> Any:
        if prior is None:
            return None
        return lambda z: prior.log_prob(params["prior"], lambda y: encode_scaled(params, y, key), z)

    def draw_prior(params: Any, key: jax.Array, n: int) -> jax.Array:
        if prior is None:
            return jax.random.normal(key, (n, latent))
        return prior.sample(params["prior"], lambda y: encode_scaled(params, y), key, n)

    return Model(init, encode, decode, law, log_prior, draw_prior)


def _prior(config: Config, scaling: Scaling, images: Any) -> Prior | None:
    components = config.prior_components
    components = COMPONENTS[config.prior] if components is None else components
    examples = scaling.to_continuous(images) if config.prior == "vamp" else ()
    return make_prior(config.prior, components, config.latent_dim, examples)


def make_loss(config: Config, model: Model) -> Callable[..., Any]:
    """The objective as loss(params, key, batch) -> (losses, aux)."""

    def loss_fn(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_z, key_e, key_d = jax.random.split(key, 3)
        prior = model.log_prior(params, jax.random.fold_in(key_e, 1))

        def encode(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return model.encode(params, x, key_e)

        def log_likelihood(x: jax.Array, z: jax.Array) -> jax.Array:
            return model.log_likelihood(x, model.decode(params, z, key_d))

        samples = {"num_samples": config.num_samples, "prior": prior}
        if config.objective == "elbo":
            return elbo(encode, log_likelihood, key_z, batch["x"], beta=config.beta, **samples)
        options = {"estimator": config.estimator, **samples}
        return iwae(encode, log_likelihood, key_z, batch["x"], **options)

    return loss_fn


def plot_latents(folder: Any, model: Model, params: Any, data: Data, key: jax.Array) -> None:
    """Write reconstructions, interpolation and the latent map."""
    spec, test = data.spec, data.test
    levels = spec.levels or 0

    log_probs = jax.jit(lambda z: model.law.log_probs(model.decode(params, z)))

    def expected(z: jax.Array) -> np.ndarray:
        return np.tensordot(np.arange(levels), np.exp(log_probs(z)), axes=1)

    encode = jax.jit(lambda x: model.encode(params, x))
    save = lambda name, images, title: _pictures.save_grid(  # noqa: E731
        folder / f"{name}.png", images, title=title, high=levels - 1, columns=10
    )
    x, latent = test["x"], encode(test["x"][:1])[0].shape[1]

    # What is expected from one sample of their codes.
    z = gaussian_sample(key, *encode(x[:40]))
    _pictures.save_reconstructions(folder, x[:40], expected(z), high=levels - 1)

    # Straight lines between the codes of pairs of test images.
    mean, _ = encode(_pictures.first(x, 20))
    share = jnp.linspace(0, 1, 10)[None, :, None]
    line = (1 - share) * mean[:10, None] + share * mean[10:, None]
    sheet = expected(line.reshape(-1, latent))
    save("interpolation", sheet, "between the codes of two test images, by row")

    # Codes of the test images: one on a line, two as they are, more by their two main directions.
    codes = np.asarray(encode(x)[0])
    if latent > 2:
        centred = codes - codes.mean(0)
        codes = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    codes = np.pad(codes, ((0, 0), (0, 2 - codes.shape[1])))

    def plot(axes: Any) -> None:
        labels = test.get("label")
        points = axes[0].scatter(*np.asarray(codes).T, s=6, c=labels, cmap="tab10")
        axes[0].set(aspect="equal")
        if labels is not None:
            axes[0].legend(*points.legend_elements(), fontsize="x-small", loc="upper right")

    _pictures.save_figure(folder / "latent_map.png", plot, title="codes of the test images", size=5)


if __name__ == "__main__":
    _run.launch(main, Config)
