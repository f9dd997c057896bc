"""Generative adversarial networks: GAN, hinge and least squares; MLP or DCGAN; with labels or not.

    critic     minimises its side of the objective on batches of data and samples
    generator  minimises the other; conditional: p(x | label), the label goes to both networks

    python -m experiments.gan
    python -m experiments.gan --network dcgan --objective hinge --spectral
    python -m experiments.gan --conditional --condition concat
    python -m experiments.gan --dataset 25gaussians --steps 20000

Samples of the averaged generator are scored: k-NN precision and recall in pixel space, the share of
copies, and where labels are asked for, how many of them a classifier trained on real images reads
back; in the plane the modes covered. The run folder gets samples.npy and samples.png.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run, _samples
from genjax.adversarial import gan, hinge, least_squares, r1_penalty
from genjax.data import DENSITIES, DataSpec, Scaling, load
from genjax.data.synthetic import GaussianMixture
from genjax.metrics import (
    high_quality_share,
    memorisation_share,
    modes_covered,
    precision_recall,
    reverse_kl_modes,
)
from genjax.networks import MLP, DCGANCritic, DCGANGenerator, init_power, spectral_normalise
from genjax.training import critic_batches, init_saddle_state, make_saddle_step

MOST_MODES = 25  # moons and swissroll are mixtures too, of many Gaussians along a curve
OBJECTIVES = {"gan": gan, "hinge": hinge, "least_squares": least_squares}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig(_run.RunConfig):
    """What GAN, f-GAN and WGAN share: two networks and their optimisers."""

    dataset: str = "digits"
    """digits or another image set, or a 2-D density such as 25gaussians."""
    network: Literal["mlp", "dcgan"] = "mlp"
    """Fully connected networks, or convolutions (images only, squares of base * 2^k)."""
    conditional: bool = False
    """Give the label to both networks."""
    condition: Literal["projection", "concat"] = "projection"
    """How the critic takes the label: an inner product with its features, or as an input."""
    latent_dim: int = 16
    """Dimensions of the noise."""
    width: int = 128
    """Units of a hidden layer (mlp), or channels of the widest convolution (dcgan)."""
    depth: int = 2
    """Hidden layers of each network (mlp)."""
    base: int = 2
    """Side of the smallest feature map (dcgan)."""
    steps: int = 5000
    """Updates of the generator."""
    batch_size: int = 64
    """Examples, and samples, in one update."""
    steps_per_call: int = 20
    """Updates in one call of the compiled program."""
    n_critic: int = 1
    """Updates of the critic before each one of the generator."""
    learning_rate: float = 5e-4
    """Adam's rate for both players, falling along a cosine to a tenth."""
    beta1: float = 0.5
    """Adam's first decay."""
    beta2: float = 0.999
    """Adam's second decay."""
    ema: float = 0.998
    """Decay of the averaged generator, which is the one that is sampled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(AdversarialConfig):
    """Train a GAN and score its samples."""

    objective: Literal["gan", "hinge", "least_squares"] = "gan"
    """The two losses."""
    r1: float = 0.0
    """Weight gamma of the gradient penalty at real examples, gamma / 2 |grad|^2."""
    spectral: bool = False
    """Divide the critic's weights by their largest singular values."""


class Players(NamedTuple):
    """Both networks as functions; labels are None where the model has none."""

    init_critic: Callable[[jax.Array], Any]
    init_generator: Callable[[jax.Array], Any]
    score: Callable[[Any, jax.Array, Any], jax.Array]  # (params, x, label) -> scores [batch]
    generate: Callable[[Any, jax.Array, Any], jax.Array]  # (params, z, label) -> x
    prepare: Callable[[jax.Array], jax.Array]  # data as loaded -> what the critic sees


def main(config: Config) -> dict[str, Any]:
    """Train, sample, evaluate; returns the summary."""
    arrays, spec = load(config.dataset, "train", data_dir=config.data_dir)
    players = build(config, spec)
    init_critic, score, project = players.init_critic, players.score, None
    if config.spectral:
        init_critic, score, project = spectral(players)
    objective = OBJECTIVES[config.objective]

    def critic_loss(critic: Any, generator: Any, key: Any, batch: Any) -> Any:
        real, fake, label = real_and_fake(config, players, generator, key, batch)
        losses = objective(score(critic, real, label), score(critic, fake, label))
        total = losses.critic
        if config.r1:
            penalty = r1_penalty(lambda x: score(critic, x, label), real)
            total = total + config.r1 / 2 * jnp.mean(penalty)
        return total, {"bound": losses.bound}

    def generator_loss(critic: Any, generator: Any, key: Any, batch: Any) -> Any:
        _, fake, label = real_and_fake(config, players, generator, key, batch)
        scores = score(critic, fake, label)
        return objective(scores, scores).generator, {}

    changed = players._replace(init_critic=init_critic, score=score)
    return train(config, changed, arrays, spec, critic_loss, generator_loss, project=project)


def build(config: AdversarialConfig, spec: DataSpec) -> Players:
    """Both networks for a data set."""
    plane, event = spec.levels is None, tuple(spec.shape)
    size = int(np.prod(event))
    classes = spec.classes if config.conditional else None
    if config.conditional and classes is None:
        raise ValueError(f"conditional needs labels, which the data set {spec.name!r} has not")
    if plane and config.network == "dcgan":
        raise ValueError(f"network must be mlp for points in the plane ({spec.name!r})")
    scaling = None if plane else Scaling(spec.levels)
    z, x = jnp.zeros((1, config.latent_dim)), jnp.zeros((1, *event))
    label = None if classes is None else jnp.zeros(1, jnp.int32)
    spread = 1.0

    if config.network == "dcgan":
        stages = int(np.log2(event[0] / config.base))
        sizes = {
            "size": event[0],
            "channels": event[2],
            "width": max(config.width // 2 ** (stages - 1), 1),
            "base": config.base,
            "classes": classes,
        }
        critic, generator = (
            DCGANCritic(condition=config.condition, **sizes),
            DCGANGenerator(**sizes),
        )
        score, generate = critic.apply, generator.apply
        init_critic = lambda key: critic.init(key, x, label)  # noqa: E731
        init_generator = lambda key: generator.init(key, z, label)  # noqa: E731
    else:
        hidden = (config.width,) * config.depth
        joined = classes is not None and config.condition == "concat"
        # One output for each class: <w_label, features>, the projection critic.
        outputs = 1 + (classes or 0) * (not joined)
        critic_mlp = MLP((*hidden, outputs), activation=leaky)
        generator_mlp = MLP((*hidden, size), activation=jax.nn.relu)
        spread = 4.0 if plane else 1.0

        def score(params: Any, x: jax.Array, label: Any) -> jax.Array:
            flat = x.reshape(len(x), -1) / spread
            if joined:
                flat = jnp.concatenate([flat, jax.nn.one_hot(label, classes)], axis=1)
            out = critic_mlp.apply(params, flat)
            if outputs == 1:
                return out[:, 0]
            return out[:, 0] + jnp.take_along_axis(out[:, 1:], label[:, None], axis=1)[:, 0]

        def generate(params: Any, z: jax.Array, label: Any) -> jax.Array:
            if classes is not None:
                z = jnp.concatenate([z, jax.nn.one_hot(label, classes)], axis=1)
            out = generator_mlp.apply(params, z).reshape(len(z), *event)
            return spread * out if plane else jnp.tanh(out)

        inputs = jnp.zeros((1, size + (classes or 0) * joined))
        noise = jnp.zeros((1, config.latent_dim + (classes or 0)))
        init_critic = lambda key: critic_mlp.init(key, inputs)  # noqa: E731
        init_generator = lambda key: generator_mlp.init(key, noise)  # noqa: E731

    prepare = (lambda x: x) if scaling is None else scaling.to_continuous
    return Players(init_critic, init_generator, score, generate, prepare)


def leaky(x: jax.Array) -> jax.Array:
    """Leaky ReLU with DCGAN's slope."""
    return jax.nn.leaky_relu(x, 0.2)


def spectral(players: Players) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The critic with its weights divided by their largest singular values.

    Its parameters are {"weights", "power"}; the power iteration goes on after each update.
    """

    def init(key: jax.Array) -> Any:
        weights = players.init_critic(key)
        return project({"weights": weights, "power": init_power(weights, key)})

    def score(params: Any, x: jax.Array, label: Any) -> jax.Array:
        weights, _ = spectral_normalise(params["weights"], params["power"])
        return players.score(weights, x, label)

    def project(params: Any) -> Any:
        return {**params, "power": spectral_normalise(params["weights"], params["power"])[1]}

    return init, score, project


def real_and_fake(
    config: AdversarialConfig, players: Players, generator: Any, key: Any, batch: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """The batch as the critic sees it, as many samples of the generator, and their labels."""
    label = batch["label"] if config.conditional else None
    real = players.prepare(batch["x"])
    z = jax.random.normal(jax.random.fold_in(key, 0), (len(real), config.latent_dim))
    return real, players.generate(generator, z, label), label


def adam(config: AdversarialConfig, updates: int) -> optax.GradientTransformation:
    """Adam for so many updates."""
    rate = optax.cosine_decay_schedule(config.learning_rate, updates, alpha=0.1)
    return optax.adam(rate, b1=config.beta1, b2=config.beta2)


def train(
    config: AdversarialConfig,
    players: Players,
    arrays: Any,
    spec: DataSpec,
    critic_loss: Any,
    generator_loss: Any,
    *,
    project: Any = None,
    simultaneous: bool = False,
) -> dict[str, Any]:
    """Train both players, sample the averaged generator, score the samples."""
    key_c, key_g, key_run, key_z = jax.random.split(jax.random.key(config.seed), 4)
    optimizers = adam(config, config.steps * config.n_critic), adam(config, config.steps)
    critic = jax.jit(players.init_critic)(key_c)
    generator = jax.jit(players.init_generator)(key_g)
    state = init_saddle_state(critic, generator, *optimizers, key_run, ema_decays=(config.ema,))

    count = _samples.sample_count(arrays, spec)
    label = None
    if config.conditional:
        label = jnp.arange(count, dtype=jnp.int32) % spec.classes

    @jax.jit
    def sample(params: Any) -> jax.Array:
        z = jax.random.normal(key_z, (count, config.latent_dim))
        x = players.generate(params, z, label)
        return x if spec.levels is None else Scaling(spec.levels).to_levels(x)

    def evaluate(state: Any) -> dict[str, float]:
        samples = np.asarray(sample(state.ema_params(config.ema)))
        return measure(config, arrays, samples, label)

    with _run.start_run(config) as run:
        step_fn = make_saddle_step(
            critic_loss,
            generator_loss,
            *optimizers,
            n_critic=config.n_critic,
            project=project,
            simultaneous=simultaneous,
            mesh=_run.mesh(config),
            steps_per_call=config.steps_per_call,
        )
        batches = critic_batches(_run.batches(config, arrays), config.n_critic)
        state = _run.fit(run, state, step_fn, batches, evaluate=evaluate)
        params = state.ema_params(config.ema)
        samples, cost = _samples.save_samples(run, lambda: sample(params), evaluations=1)
        path = run.folder / "samples.png"
        if spec.levels is None:
            _pictures.save_points(path, {"data": arrays["x"][:2000], "samples": samples[:2000]})
        else:
            columns = spec.classes if config.conditional else 10
            _pictures.save_grid(
                path, samples[: 10 * columns], high=spec.levels - 1, columns=columns
            )
        cost["parameters"] = _samples.parameter_count((critic, params))
        return _run.finish(run, {"examples": len(arrays["x"]), **cost, **evaluate(state)})


def measure(
    config: AdversarialConfig, arrays: Any, samples: np.ndarray, label: Any = None
) -> dict[str, float]:
    """Score samples against the data: modes in the plane; precision, recall and copies of images,
    and the share of labels that a classifier of real images reads back."""
    if config.dataset in DENSITIES:
        density = DENSITIES[config.dataset]
        if not isinstance(density, GaussianMixture) or len(density.means) > MOST_MODES:
            return {}
        near = {"means": density.means, "std": density.std}
        return {
            "modes": int(modes_covered(samples, **near)),
            "high_quality_share": float(high_quality_share(samples, **near)),
            "reverse_kl_modes": float(reverse_kl_modes(samples, density.means)),
        }
    held_out = load(config.dataset, "test", data_dir=config.data_dir)[0]["x"]
    flat = [x.reshape(len(x), -1).astype(np.float32) for x in (arrays["x"], held_out, samples)]
    precision, recall = precision_recall(flat[0][: len(samples)], flat[2], k=3)
    scores = {
        "precision": float(precision),
        "recall": float(recall),
        "memorised": float(memorisation_share(*flat)),
    }
    if label is not None:
        scores["label_accuracy"] = label_accuracy(flat[0], arrays["label"], flat[2], label)
    return scores


def label_accuracy(images: Any, labels: Any, samples: Any, asked: Any) -> float:
    """Share of samples in which a support vector machine of real images reads the label asked for.

    On the digits' test split it reads 99.2% of the real labels.
    """
    from sklearn.svm import SVC

    classifier = SVC(gamma=0.001, C=10).fit(images[:10_000], labels[:10_000])
    return float(np.mean(classifier.predict(samples) == np.asarray(asked)))


if __name__ == "__main__":
    _run.launch(main, Config)
