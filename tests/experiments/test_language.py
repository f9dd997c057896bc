"""A short run of the language model, whole: what it writes, resumes, refuses and prints."""

import dataclasses
import json
import math
from collections import Counter

import jax
import numpy as np
import pytest

from experiments import _run, _system, language_model
from experiments._text_baselines import baselines, kneser_ney

TEXT = "the cat sat on the mat. the dog sat on the log. " * 60
QUICK = {"devices": 1, "progress": False, "log_every": 2}


def config(tmp_path, **changes):
    path = tmp_path / "own.txt"
    if not path.exists():
        path.write_text(TEXT)
    options = {"dataset": str(path), "vocabulary": 256, "length": 16, "depth": 1, "width": 16,
               "heads": 2, "steps": 8, "batch_size": 8, "samples": 2, "save_every": 4,
               "learning_rate": 1e-2}  # fmt: skip
    return language_model.Config(run_dir=str(tmp_path / "run"), **{**options, **QUICK, **changes})


def test_kneser_ney_is_a_law():
    """After any context the 256 bytes have probabilities that sum to 1."""
    train = TEXT[:400].encode()
    for context in (b"the ", b"zz", b"t"):
        bits = [
            len(context + bytes([b])) * kneser_ney(train, context + bytes([b]), 4)
            - len(context) * kneser_ney(train, context, 4)
            for b in range(256)
        ]
        np.testing.assert_allclose(np.sum(2.0 ** -np.asarray(bits)), 1, rtol=1e-9)


def test_kneser_ney_of_one_byte_by_hand():
    """Unigrams of order 1: discounted counts, the rest spread over 256 bytes."""
    train, counts = b"aabbbcd", Counter(b"aabbbcd")
    discount = 2 / (2 + 2 * 1)  # two bytes once, one byte twice
    expected = (counts[ord("b")] - discount) / 7 + discount * 4 / 7 / 256
    np.testing.assert_allclose(kneser_ney(train, b"b", 1), -math.log2(expected))


def test_baselines_know_the_training_part():
    found = baselines(TEXT[:2000].encode(), TEXT[2000:].encode())
    assert all(0 < bits < 0.5 for bits in found.values()), found


@pytest.mark.slow
def test_a_short_run_leaves_its_files_and_goes_on_from_a_prompt(tmp_path, capsys):
    folder = tmp_path / "run"
    summary = language_model.main(config(tmp_path, held_out=0.2))
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert 0 < summary["bits_per_byte"] < 8
    # The text repeats itself, so that what is learnt from its test part helps with the rest of it.
    assert 0 < summary["bits_per_byte_adapted"] < summary["bits_per_byte"]
    assert 0 < summary["bits_per_byte_held_out_adapted"] < summary["bits_per_byte_held_out"]
    assert summary["train_bytes"] + summary["test_bytes"] == len(TEXT)
    for name in ("samples.txt", "loss.png", "params.npz"):
        assert (folder / name).stat().st_size > 30
    assert np.load(folder / "samples.npy").shape == (2, 16)

    system, params, stored = _system.reopen(folder)
    assert stored.text_sha256 == summary["text_sha256"]
    samples = system.sample(params, _system.keys(0).sample, 2)
    np.testing.assert_array_equal(samples, np.load(folder / "samples.npy"))

    capsys.readouterr()
    again = language_model.Config(sample_from=str(folder), prompt="the c", samples=2, temperature=0)
    found = language_model.main(again)
    assert found["texts"][0] == found["texts"][1]
    assert all(text.startswith("the c") for text in found["texts"])
    assert found["texts"][0] in capsys.readouterr().out
    with pytest.raises(ValueError, match="prompt must be shorter than 16 tokens, got 16"):
        language_model.main(dataclasses.replace(again, prompt="x" * 16))

    (tmp_path / "own.txt").write_text(TEXT + "another text")
    with pytest.raises(_run.RunError, match="text_sha256 must be that of the run"):
        language_model.main(again)
    with pytest.raises(_run.RunError, match="has text_sha256 = "):
        language_model.main(config(tmp_path, held_out=0.2, resume=True))


@pytest.mark.slow
@pytest.mark.parametrize("network", ["s4", "s4d", "mamba", "mamba2"])
def test_state_spaces_are_networks_too(tmp_path, network):
    summary = language_model.main(config(tmp_path, network=network, steps=30))
    assert 0 < summary["bits_per_byte"] < 8  # that of guessing
    system, params, _ = _system.reopen(tmp_path / "run")
    samples = system.sample(params, _system.keys(0).sample, 2)
    np.testing.assert_array_equal(samples, np.load(tmp_path / "run" / "samples.npy"))


@pytest.mark.slow
def test_a_resumed_run_equals_one(tmp_path):
    def final(folder):
        with np.load(folder / "run" / "params.npz") as file:
            return {name: file[name] for name in file.files}

    half, whole = tmp_path / "half", tmp_path / "whole"
    for folder in (half, whole):
        folder.mkdir()
    # The rate falls by the number of steps, so that it must be that of the whole run.
    with pytest.raises(KeyboardInterrupt):
        stop_at(4, config(half))
    language_model.main(config(half, resume=True))
    language_model.main(config(whole))
    for name, value in final(whole).items():
        np.testing.assert_array_equal(final(half)[name], value)


def stop_at(step, settings):
    """Interrupt the run when it asks for the batch of that step."""
    original = _run.batches

    def batches(config, arrays):
        give = original(config, arrays)

        def batch(n):
            if n == step + 1:
                raise KeyboardInterrupt
            return give(n)

        return batch

    _run.batches = batches
    try:
        language_model.main(settings)
    finally:
        _run.batches = original


def test_bad_options(tmp_path):
    with pytest.raises(ValueError, match=r"network must be one of .*did you mean 'gpt'"):
        language_model.main(config(tmp_path, network="gtp"))
    with pytest.raises(ValueError, match="text must be one of"):
        language_model.main(config(tmp_path, dataset="nowhere"))
    with pytest.raises(ValueError, match="held_out must lie in"):
        language_model.main(config(tmp_path, held_out=0.7))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_eight_devices_and_one_have_the_same_losses(tmp_path):
    losses = []
    for devices in (1, 8):
        settings = config(tmp_path, devices=devices)
        data = language_model.load_data(settings)
        system = language_model.build(settings, data)
        state, step, batches = _system.prepare(settings, system, data)
        found = []
        for n in range(3):
            state, metrics = jax.block_until_ready(step(state, batches(n)))
            found.append(float(metrics["loss"]))
        losses.append(found)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
