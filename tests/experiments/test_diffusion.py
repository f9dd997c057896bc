"""Short runs of the diffusion experiments, whole, and their parts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import _run, deep_image_prior, diffusion, inverse
from genjax import diffusion as gd
from genjax.data import Scaling, load
from genjax.training import init_state, train_step
from tests.diffusion.oracles import reference

SPLITS = ("train", "test")
SHORT = diffusion.Config(
    steps=60,
    steps_per_call=30,
    batch_size=64,
    width=64,
    depth=1,
    dropout=0.0,
    ema=0.9,
    learning_rate=5e-3,
    num_samples=110,
    num_steps=4,
    likelihood_steps=4,
    devices=1,
    progress=False,
)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion") / "run"
    return folder, diffusion.main(dataclasses.replace(SHORT, run_dir=str(folder)))


@pytest.mark.slow
def test_summary_and_files(short_run):
    folder, summary = short_run
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["bits_per_dim"] < 4.2  # a uniform law over the 17 levels has 4.09
    assert 0 <= summary["label_accuracy"] <= 1
    assert 0 <= summary["memorised"] <= 1
    assert (folder / "samples.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]


@pytest.mark.slow
def test_sampling_from_the_checkpoint_repeats_the_run(short_run, tmp_path):
    """No training: the same weights and key give the same samples, hence the same numbers."""
    folder, summary = short_run
    again = dataclasses.replace(
        SHORT,
        sample_from=str(folder),
        run_dir=str(tmp_path / "again"),
        width=7,  # of no effect: the model is the run's
        likelihood_steps=0,
    )
    found = diffusion.main(again)
    for name in ("precision", "recall", "label_accuracy", "parameters"):
        assert found[name] == summary[name], name
    assert found["training_seconds"] == 0
    other = dataclasses.replace(again, run_dir=str(tmp_path / "b"), sampler="ddim", guidance=2.0)
    assert diffusion.main(other)["sampling_evaluations"] == 8
    assert not (tmp_path / "b" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_points(tmp_path):
    config = dataclasses.replace(
        SHORT,
        dataset="8gaussians",
        process="vp",
        prediction="epsilon",
        weighting="epsilon",
        times="uniform",
        sampler="dpm_solver",
        num_steps=8,
        run_dir=str(tmp_path / "run"),
    )
    summary = diffusion.main(config)
    assert summary["score_error"]["3.0"] < 0.9
    assert summary["test_log_likelihood"] < summary["exact_log_likelihood"] < 0


def test_score_error_of_the_exact_denoiser_is_zero(monkeypatch):
    from genjax import diffusion as gd
    from genjax.data import DENSITIES

    density = DENSITIES["8gaussians"]
    exact = gd.mixture_denoiser(
        gd.GaussianMixture(
            jnp.full(8, 1 / 8),
            jnp.asarray(density.means, jnp.float32),
            jnp.broadcast_to(density.std**2 * jnp.eye(2), (8, 2, 2)),
        ),
        process=gd.EDM(),
    )

    class Model:
        process = gd.EDM()

        def denoise(self, scale):
            return lambda x, t: x + scale * (exact(x, t) - x)

    x = density.sample(jax.random.key(0), 200)
    for scale, expected in [(1.0, 0.0), (1.1, 0.1)]:
        errors = diffusion.score_error(
            Model(), scale, x, density.means, density.std, jax.random.key(1)
        )
        np.testing.assert_allclose(list(errors.values()), expected, atol=1e-3)


def _kernel_model(data, width):
    """The exact denoiser of a kernel density on images, in the place of a trained model."""
    flat = jnp.asarray(data.reshape(len(data), -1))

    def denoise(x, t):
        y, variance = x.reshape(len(x), -1), jnp.square(t)[:, None]
        gaps = jnp.sum(jnp.square(y[:, None] - flat[None]), axis=-1)
        shares = jax.nn.softmax(-0.5 * gaps / (variance + width**2), axis=-1)
        mean = (width**2 * y + variance * (shares @ flat)) / (variance + width**2)
        return mean.reshape(x.shape)

    return diffusion.Model(gd.EDM(), None, None, "x0", float(data.std()), data.mean()), denoise


@pytest.mark.parametrize("task", ["inpaint", pytest.param("deblur", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["pigdm", pytest.param("dps", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_guided_digits_are_nearer_the_truth_than_the_mean_image(task, method, monkeypatch):
    """At the defaults: an exact denoiser leaves the guidance alone to answer for the error."""
    scaling = Scaling(17)
    train, test = (np.asarray(scaling.to_continuous(load("digits", n)[0]["x"])) for n in SPLITS)
    train, truth = train[::2] - train.mean(), jnp.asarray(test[:40] - train.mean())
    model, denoise = _kernel_model(train, 0.15)
    monkeypatch.setattr(diffusion.Model, "denoise", lambda *_: denoise)
    config = inverse.Config(task=task, method=method)
    mask = inverse.hidden_square((8, 8, 1))
    key_noise, key = jax.random.split(jax.random.key(0))
    noise = config.noise_std * jax.random.normal(key_noise, truth.shape)
    operator = inverse.blur if task == "deblur" else (lambda y: y * ~mask)
    observed = operator(truth) + (noise if task == "deblur" else noise * ~mask)
    restored = jax.jit(
        lambda key: inverse.restore(config, model, None, operator, observed, mask, key)
    )(key)
    where = np.asarray(mask) if task == "inpaint" else np.ones((1, 8, 8, 1))
    error = inverse.rms(np.asarray(restored - truth), where)
    of_the_mean = inverse.rms(train.mean(0) - np.asarray(truth), where)
    assert error < (0.95 if task == "inpaint" else 0.75) * of_the_mean, (error, of_the_mean)
    misfit = np.asarray(jnp.sqrt(jnp.mean(jnp.square(operator(restored) - observed))))
    assert misfit < 3 * config.noise_std


@pytest.mark.parametrize("task", [("inpaint", "replacement"), ("deblur", "pigdm")])
@pytest.mark.slow
def test_inverse(short_run, tmp_path, task):
    folder, _ = short_run
    config = inverse.Config(
        model=str(folder),
        task=task[0],
        method=task[1],
        num_steps=4,
        num_images=12,
        run_dir=str(tmp_path / "run"),
    )
    summary = inverse.main(config)
    assert np.isfinite(summary["error"])
    assert (tmp_path / "run" / "restored.png").stat().st_size > 500
    if task[0] == "inpaint":  # what is seen is kept
        assert summary["misfit_of_the_observation"] < 1e-5


def test_degradations():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    flat = inverse.blur(jnp.ones((1, 8, 8, 1)))
    np.testing.assert_allclose(flat[0, 2:6, 2:6], 1, atol=1e-6)
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    expected = np.sum(np.asarray(x)[0, 2:5, 3:6, 0] * kernel)
    np.testing.assert_allclose(inverse.blur(x)[0, 3, 4, 0], expected, rtol=1e-5)
    assert inverse.hidden_square((8, 8, 1)).sum() == 16


@pytest.mark.slow
def test_deep_image_prior(tmp_path):
    config = deep_image_prior.Config(
        size=16, channels=(4,), steps=6, steps_per_call=3, run_dir=str(tmp_path / "run"),
        progress=False,
    )  # fmt: skip
    summary = deep_image_prior.main(config)
    np.testing.assert_allclose(summary["error_of_the_noisy_image"], 0.01, rtol=0.15)
    assert summary["best_error_to_clean"] <= summary["last_error_to_clean"]
    for name in ("errors", "images"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 1000


def test_deep_image_prior_of_a_linear_network(x64):
    """Gradient descent on the experiment's loss follows the spectral filter; the clean error has
    its minimum inside."""
    data = reference("deep_image_prior_linear")
    inputs, expected = data["inputs"], data["expected"]
    matrix, noisy, clean = (jnp.array(inputs[name]) for name in ("J", "y", "x0"))
    dims = len(noisy)
    loss = deep_image_prior.make_loss(
        lambda params, z: (matrix @ params)[None], jnp.zeros((1, 1)), 0.0
    )
    # The reference descends |J theta - y|^2 / 2, the experiment the mean of the squares.
    optimizer = optax.sgd(inputs["lr"] * dims / 2)
    state = init_state(jnp.zeros(matrix.shape[1]), optimizer, jax.random.key(0))
    batch = {"noisy": noisy[None], "clean": clean[None]}

    def body(state, _):
        return train_step(loss, optimizer, state, batch)

    _, metrics = jax.jit(lambda state: jax.lax.scan(body, state, length=4001))(state)
    at = np.array(expected["index"])
    to_noisy, to_clean = (dims * metrics[f"error_to_{name}"] for name in ("noisy", "clean"))
    np.testing.assert_allclose(to_noisy[at], expected["L_sigma"], rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(to_clean[at], expected["L_0"], rtol=1e-7)
    assert int(jnp.argmin(to_clean)) == expected["argmin_L0"]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="sampler must be one of"):
        diffusion.main(dataclasses.replace(SHORT, sampler="hein"))
    with pytest.raises(_run.RunError, match=r"config\.json cannot be read"):
        diffusion.main(dataclasses.replace(SHORT, sample_from=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="dataset must be of images"):
        diffusion.main(dataclasses.replace(SHORT, dataset="moons", network="unet"))
    with pytest.raises(ValueError, match="method=replacement is for task=inpaint"):
        inverse.main(inverse.Config(task="deblur", method="replacement"))
