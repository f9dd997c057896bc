"""Latent diffusion: a flow or a diffusion model in the latents of an autoencoder of images.

    z = (encode(x) - shift) * scale   of unit variance; shift and scale are kept with the weights
    flow        dz / dt = v(z, t) from noise to latents, by flow matching
    diffusion   a denoiser of z + sigma noise
    x = decode(z / scale + shift)

    python -m experiments.latent
    python -m experiments.latent --model diffusion --conditional --guidance 2
    python -m experiments.latent --latents vq --network unet
    python -m experiments.latent --critic 0.5 --perceptual 1
    python -m experiments.latent --dataset mnist_5k --channels 8 32 64 --width 512 --conditional
    python -m experiments.latent --autoencoder runs/vae/1

The autoencoder is trained in the first part of the same run, the model in all of it; or the
autoencoder is that of a finished run. The summary's `sampling_seconds` include decoding, and can be
read beside those of experiments.flow_matching; the run folder gets reconstructions.png.

Of 28 x 28 pixels the full resolution is what costs: the line above has few channels there, latents
of 7 x 7 x 4 and a perceptron of them. With --batch-size 64 --steps 2500 --guidance 2 a step takes
0.2 s on one core while the autoencoder trains, 0.11 after it, and the whole seven minutes; then a
classifier reads the label asked for in 98.7%.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.lax import stop_gradient

from experiments import _keys, _pictures, _run
from experiments._autoencoders import Autoencoder, Own, own, taken
from experiments._data import Data, load_data
from experiments._latent_models import Field, make_field
from experiments._networks import NetworkConfig
from experiments._pixels import in_hundreds
from experiments._system import Row, System, train
from genjax import checks

ROWS = (
    Row("latent_flow", "Latent flow", images={},
        larger={"channels": (8, 32, 64), "width": 512, "batch_size": 64}),
    Row("latent_diffusion", "Latent diffusion", images={"model": "diffusion"}),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(NetworkConfig):
    """Train an autoencoder and a model of its latents, or the model alone."""

    autoencoder: str | None = None
    """Folder of a finished run of latent, vae or vqvae whose autoencoder is taken (default: one is
    trained here)."""
    latents: Literal["kl", "vq"] = "kl"
    """Gaussian latents drawn to N(0, 1) a little, or such that are rounded to a codebook."""
    features: int = 4
    """Numbers of a latent at each place."""
    channels: tuple[int, ...] = (16, 32, 32)
    """The autoencoder's channels of the image's resolution, then of each halving."""
    kl_weight: float = 1e-2
    """Weight of the divergence, summed over the latents, beside the summed absolute error (kl)."""
    codes: int = 64
    """Vectors of the codebook (vq)."""
    perceptual: float = 0.0
    """Weight of the autoencoder's perceptual distance, on the maps of a trained classifier."""
    feature_network: str | None = None
    """features.npz of experiments.features for that distance (default: the shipped one)."""
    critic: float = 0.0
    """Weight of a patch critic of decoded images, times |gradient of the error| / |gradient of the
    critic| for the decoder's last layer."""
    share: float = 0.4
    """Share of the steps that train the autoencoder too, which stays as it is afterwards."""
    model: Literal["flow", "diffusion"] = "flow"
    """What is trained in the latents, see above."""
    network: Literal["mlp", "unet", "dit"] = "mlp"
    """Residual MLP on the flattened latents, or over their grid a U-Net or a transformer."""
    patch: int = 1
    dropout: float = 0.1
    conditional: bool = False
    """Give the labels to the model."""
    label_drop: float = 0.1
    """Share of labels hidden in training, for guidance."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is the conditional model itself."""
    num_steps: int = 40
    """Steps of the sampler, one evaluation each: Euler (flow), DPM-Solver++ (diffusion)."""
    learning_rate: float = 2e-3
    """Adam's rate: the autoencoder's falls to 0 over its share of the steps, the model's to a
    hundredth over all."""
    ema: float = 0.999
    steps: int = 5000
    batch_size: int = 128
    steps_per_call: int = 1
    """Updates in one call; more do not help convolutions on a CPU."""
    log_every: int = 100


def main(config: Config) -> dict[str, Any]:
    """Train, sample, judge, draw; returns the summary."""
    data = load_data(config)
    check(config, data)
    trained, maps = find_autoencoder(config, data)
    system = system_of(config, data, trained, maps)
    return train(config, system, data, partial(report, config, data, maps))


def build(config: Config, data: Data) -> System:
    """The autoencoder, or what is taken in its place, and the model of its latents."""
    check(config, data)
    return system_of(config, data, *find_autoencoder(config, data))


def find_autoencoder(config: Config, data: Data) -> tuple[Own | None, Autoencoder]:
    """What is trained here, or None, and its maps or those of a finished run."""
    if config.autoencoder is not None:
        return None, taken(config.autoencoder, data, config.dataset)
    trained = own(config, data)
    return trained, trained.maps


def system_of(config: Config, data: Data, trained: Own | None, maps: Autoencoder) -> System:
    """The model of latents with the autoencoder that is trained, or carried."""
    field = make_field(config, maps.shape, data.spec.classes if config.conditional else None)

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        key_z, key_x = jax.random.split(key)
        scaled = scale_of(params)
        z = field.sample(params["model"], key_z, n, None if label is None else jnp.asarray(label))
        z = z / scaled["scale"] + scaled["shift"]
        return in_hundreds(partial(maps.decode, params["autoencoder"]), key_x, n, z)

    system = System(
        field.init,
        None,
        None,
        sample,
        evaluations=config.num_steps * (1 if config.guidance == 1 else 2),
        labels=data.labels() if config.conditional else None,
        remat=config.network in ("unet", "dit"),
    )
    if trained is None:
        return in_taken(config, data, system, maps, field)
    return with_own(config, data, system, trained, field)


def in_taken(config: Config, data: Data, system: System, maps: Autoencoder, field: Field) -> System:
    """The model alone is trained; what was taken is carried and stored."""

    def loss(params: Any, key: jax.Array, batch: Any, carry: Any) -> Any:
        key_z, key_label, key_field = jax.random.split(key, 3)
        z = maps.encode(carry["autoencoder"], key_z, batch["x"])
        z = (z - carry["latents"]["shift"]) * carry["latents"]["scale"]
        label = hidden_labels(config, data, key_label, batch)
        return field.loss(params, key_field, z, label), {}, {}

    return system._replace(
        loss=loss,
        optimizer=adam(config, config.steps, 0.01),
        init_carry=lambda key, params: {"autoencoder": maps.weights, "latents": maps.latents},
        absorb=lambda carry, params, seen: carry,
        merge_carry=lambda params, carry: {"model": params, **carry},
    )


def with_own(config: Config, data: Data, system: System, trained: Own, field: Field) -> System:
    """Both are trained, the autoencoder up to step `share` of all; what a step sees of the latents'
    mean and square is averaged, and after that share stays near what it is."""
    last, maps = max(1, round(config.share * config.steps)), trained.maps

    def init(key: jax.Array) -> Any:
        key_a, key_m = jax.random.split(key)
        return {"autoencoder": trained.init(key_a), "model": field.init(key_m)}

    def init_carry(key: jax.Array, params: Any) -> Any:
        key_codes, key_z = jax.random.split(key)
        x = jnp.asarray(data.train["x"][:2000])
        codes = trained.start(key_codes, params["autoencoder"], x)
        weights = {"networks": params["autoencoder"], "codes": codes}
        found = moments(maps.encode(weights, key_z, x))
        return {"step": jnp.zeros((), jnp.int32), "codes": codes, **found}

    def loss(params: Any, key: jax.Array, batch: Any, carry: Any) -> Any:
        key_auto, key_label, key_field = jax.random.split(key, 3)
        weights = {"networks": params["autoencoder"], "codes": carry["codes"]}

        def learn(key: jax.Array) -> Any:
            return trained.loss(weights, key, batch["x"])

        def encode(key: jax.Array) -> Any:
            """What `learn` returns, with zeros for all that only training needs."""
            zero = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)  # noqa: E731
            *rest, _ = jax.tree.map(zero, jax.eval_shape(learn, jax.random.key(0)))
            return *rest, maps.encode(weights, key, batch["x"])

        found = jax.lax.cond(carry["step"] < last, learn, encode, key_auto)
        losses, terms, codes, z = found
        z, latents = stop_gradient(z), scaled_by(carry)
        label = hidden_labels(config, data, key_label, batch)
        error = field.loss(
            params["model"], key_field, (z - latents["shift"]) * latents["scale"], label
        )
        seen = {"codes": codes, **moments(z)}
        return losses + error, {**terms, "model": error}, seen

    def absorb(carry: Any, params: Any, seen: Any) -> Any:
        learning = carry["step"] < last
        codes = trained.absorb(carry["codes"], seen["codes"])
        keep = lambda new, old: jnp.where(learning, new, old)  # noqa: E731
        average = lambda old, new: old + 0.01 * (new - old)  # noqa: E731
        return {
            "step": carry["step"] + 1,
            "codes": jax.tree.map(keep, codes, carry["codes"]),
            **{name: average(carry[name], seen[name]) for name in ("mean", "square")},
        }

    def merge(params: Any, carry: Any) -> Any:
        weights = {"networks": params["autoencoder"], "codes": carry["codes"]}
        return {"model": params["model"], "autoencoder": weights, "latents": scaled_by(carry)}

    parts: Any = {"model": adam(config, config.steps, 0.01), "autoencoder": adam(config, last, 0.0)}
    return system._replace(
        init=init,
        loss=loss,
        optimizer=optax.multi_transform(parts, {name: name for name in parts}),
        init_carry=init_carry,
        absorb=absorb,
        merge_carry=merge,
    )


def check(config: Config, data: Data) -> None:
    """Raise ValueError for options that make no model."""
    data.require("images", labels=config.conditional)
    for name in ("features", "codes", "num_steps"):
        checks.integer(name, getattr(config, name), 1)
    checks.integers("channels", config.channels, 1)
    for name in ("kl_weight", "perceptual", "critic"):
        checks.at_least(name, getattr(config, name), 0)
    for name in ("share", "label_drop"):
        checks.between(name, getattr(config, name), 0, 1)
    if config.guidance != 1 and not config.conditional:
        raise ValueError(f"guidance must be 1 without --conditional, got {config.guidance}")


def hidden_labels(config: Config, data: Data, key: jax.Array, batch: Any) -> Any:
    """The batch's labels, some of them hidden; None without labels."""
    if not config.conditional:
        return None
    hidden = jax.random.bernoulli(key, config.label_drop, batch["label"].shape)
    return jnp.where(hidden, data.spec.classes or 0, batch["label"])


def moments(z: jax.Array) -> dict[str, jax.Array]:
    """Mean and mean square of latents, over examples, places and channels."""
    return {"mean": jnp.mean(z), "square": jnp.mean(jnp.square(z))}


def scaled_by(carry: Any) -> dict[str, jax.Array]:
    """Shift and scale of latents with these moments: unit variance around 0."""
    variance = jnp.maximum(carry["square"] - jnp.square(carry["mean"]), 1e-8)
    return {"shift": carry["mean"], "scale": jax.lax.rsqrt(variance)}


def scale_of(params: Any) -> Any:
    """The stored shift and scale; raises ValueError naming what is not there."""
    found = params.get("latents", {}) if isinstance(params, dict) else {}
    if missing := [name for name in ("shift", "scale") if name not in found]:
        raise ValueError(
            f"params hold no {' and no '.join(missing)} of the latents, which must be stored with "
            "the weights: take those of `reopen`"
        )
    return found


def adam(config: Config, steps: int, least: float) -> optax.GradientTransformation:
    """Adam with a rate that falls along a cosine to the share `least`."""
    rate = optax.cosine_decay_schedule(config.learning_rate, steps, least)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def report(
    config: Config, data: Data, maps: Autoencoder, run: Any, params: Any, samples: Any
) -> dict[str, Any]:
    """How far test images are from what comes back of them, as a share of white; their picture."""
    key_e, key_d = jax.random.split(
        jax.random.fold_in(_keys.keys(config.seed).batches, _keys.PICTURES)
    )
    x = jnp.asarray(data.test["x"][:1000])

    @jax.jit
    def again(params: Any, x: jax.Array) -> jax.Array:
        z = maps.encode(params["autoencoder"], key_e, x)
        return maps.decode(params["autoencoder"], key_d, z)

    y = np.asarray(again(params, x))
    high = (data.spec.levels or 2) - 1
    _pictures.save_reconstructions(run.folder, x, y, high=high)
    gap = np.abs(y.astype(np.float32) - np.asarray(x))
    return {"reconstruction_error": float(gap.mean() / high)}


if __name__ == "__main__":
    _run.launch(main, Config)
