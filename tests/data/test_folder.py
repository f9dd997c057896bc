"""A folder of images: cropped, resized, split and prepared once; broken files named."""

import logging
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from genjax.data import load

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def folder(tmp_path):
    """Three classes of PNG and JPEG images of odd sizes, some transparent or grey."""
    rng = np.random.default_rng(0)
    for c, name in enumerate(CLASSES):
        place = tmp_path / "images" / name / ("more" if c == 1 else "")
        place.mkdir(parents=True)
        for i in range(20):
            height, width = rng.integers(9, 40, 2)
            image = Image.fromarray(np.full((height, width, 3), 10 * i + c, np.uint8))
            mode = ("RGB", "RGBA", "L", "P")[i % 4]
            if i % 2 == 0 and mode != "RGBA":
                image.convert("RGB").save(place / f"{i}.JPG")
            else:
                made = image.quantize(2) if mode == "P" else image.convert(mode)
                made.save(place / f"{i}.png")
    (tmp_path / "images" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def break_one(folder):
    path = next((folder / "owl").glob("*.png"))
    path.write_bytes(path.read_bytes()[:60])
    return path


def test_images_and_classes(folder, tmp_path):
    name, options = f"folder:{folder}", {"data_dir": tmp_path / "data", "image_size": 16}
    train, spec = load(name, "train", **options)
    test, _ = load(name, "test", **options)
    assert spec == (name, "images", (16, 16, 3), 256, 3)
    np.testing.assert_array_equal(np.bincount(train["label"]), 18)
    np.testing.assert_array_equal(np.bincount(test["label"]), 2)
    # Every image is of one level, 10 i + class: nothing is lost, mixed up or in both splits.
    levels = np.concatenate([train["x"], test["x"]]).reshape(60, -1).astype(int)
    assert np.ptp(levels, axis=1).max() <= 2  # as JPEG has it
    label = np.concatenate([train["label"], test["label"]])
    found = sorted(zip(np.round((levels[:, 0] - label) / 10).astype(int), label, strict=True))
    assert found == [(i, c) for i in range(20) for c in range(3)]
    grey, spec = load(name, "train", **options, grey=True)
    assert spec.shape == (16, 16, 1)
    np.testing.assert_allclose(grey["x"].astype(int), train["x"][..., :1].astype(int), atol=2)


def test_the_middle_square_is_kept_and_transparency_is_white(tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    pixels = np.zeros((8, 24, 4), np.uint8)
    pixels[:, 8:16] = (200, 100, 50, 255)
    for i in range(2):
        Image.fromarray(pixels).save(place / f"{i}.png")
    data = {"data_dir": tmp_path / "data"}
    arrays, spec = load(f"folder:{place}", "train", image_size=4, **data)
    assert (spec.classes, arrays.keys()) == (None, {"x"})
    np.testing.assert_array_equal(arrays["x"][0], np.broadcast_to([200, 100, 50], (4, 4, 3)))
    whole, spec = load(f"folder:{place}", "train", **data)
    assert spec.shape == (8, 24, 3)
    np.testing.assert_array_equal(whole["x"][0, :, :8], 255)
    np.testing.assert_array_equal(whole["x"][0, :, 8:16], pixels[:, 8:16, :3])


def test_grey_of_16_bits_is_read_and_of_32_refused_by_name(tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    grey = np.linspace(0, 65535, 36).reshape(6, 6)
    for i in range(4):
        Image.fromarray(grey.astype(np.uint16)).save(place / f"{i}.png")
    name, options = f"folder:{place}", {"grey": True, "data_dir": tmp_path / "data"}
    x = load(name, "train", **options)[0]["x"]
    np.testing.assert_array_equal(x[0, :, :, 0], grey.astype(np.uint16) // 256)
    for numbers in ((grey / 65535).astype(np.float32), (grey * 1000).astype(np.int32)):
        Image.fromarray(numbers).save(place / "last.tiff")
        with pytest.raises(ValueError, match=r"last.tiff \(32 bits a pixel"):
            load(name, "train", **options)
    few = load(name, "train", unreadable="skip", **options)[0]["x"]
    assert len(few) + len(load(name, "test", unreadable="skip", **options)[0]["x"]) == 4


def test_prepared_once_and_again_where_a_file_changed(folder, tmp_path):
    name, options = f"folder:{folder}", {"data_dir": tmp_path / "data", "image_size": 8}
    load(name, "train", **options)
    (prepared,) = (tmp_path / "data" / "folder").iterdir()
    stamp = prepared.stat().st_mtime_ns
    load(name, "test", **options)
    assert (prepared.stat().st_mtime_ns, not list((tmp_path / "data").glob("prep*"))) == (stamp, 1)
    Image.new("RGB", (9, 9), "red").save(folder / "cat" / "new.png")
    arrays, _ = load(name, "train", **options)
    assert len(list((tmp_path / "data" / "folder").iterdir())) == 2
    assert len(arrays["x"]) + len(load(name, "test", **options)[0]["x"]) == 61


def test_folders_train_and_test_are_the_splits(folder, tmp_path):
    for split, size in (("train", 12), ("test", 5)):
        (tmp_path / "split" / split / "cat").mkdir(parents=True)
        for i in range(size):
            Image.new("RGB", (8, 8), (i, i, i)).save(
                tmp_path / "split" / split / "cat" / f"{i}.png"
            )
    for split, size in (("train", 12), ("test", 5)):
        arrays, spec = load(f"folder:{tmp_path}/split", split, data_dir=tmp_path / "data")
        assert (len(arrays["x"]), spec.classes) == (size, 1)


def test_a_broken_file_is_refused_or_skipped_by_name(folder, tmp_path, caplog):
    name, options = f"folder:{folder}", {"data_dir": tmp_path / "data", "image_size": 8}
    broken = break_one(folder)
    with pytest.raises(ValueError, match=f"images cannot be read: {broken} .*unreadable='skip'"):
        load(name, "train", **options)
    left = [p.name for p in (tmp_path / "data").rglob("*") if p.is_file()]
    assert left == []
    with caplog.at_level(logging.WARNING, "genjax"):
        arrays, _ = load(name, "train", unreadable="skip", **options)
    assert f"skipped 1 images that cannot be read: {broken}" in caplog.text
    assert len(arrays["x"]) + len(load(name, "test", unreadable="skip", **options)[0]["x"]) == 59


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_used_says_why(folder, tmp_path, monkeypatch):
    data = {"data_dir": tmp_path / "data"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("no image")
    for place, options, message in [
        (folder, {}, r"images must be of one size, .* \(\d+ such\)"),
        (folder, {"image_size": 0}, "image_size must be at least 1"),
        (folder, {"unreadable": "skp"}, "unreadable must be one of .*did you mean 'skip'"),
        (tmp_path / "gone", {}, "must name a folder, .*gone is none"),
        (tmp_path / "empty", {}, "empty holds no image"),
        (folder / "cat", {"image_size": 8}, None),
    ]:
        if message is None:
            (folder / "cat" / "sub").mkdir()
            Image.new("L", (8, 8)).save(folder / "cat" / "sub" / "a.png")
            message = "images beside subfolders"
        with pytest.raises(ValueError, match=message):
            load(f"folder:{place}", "train", **data, **options)
    with pytest.raises(ValueError, match="must name a local folder, got 'folder:gs://b/images'"):
        load("folder:gs://b/images", "train", **data)
    with pytest.raises(ValueError, match=r"are for folder:PATH, got .*'image_size': 8"):
        load("digits", "train", image_size=8)
    assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file()]


def test_the_command_prepares_a_folder(folder, tmp_path, monkeypatch, capsys):
    command = ["genjax.data", f"folder:{folder}", "--data-dir", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", [*command, "--image-size", "8", "--grey"])
    runpy.run_module("genjax.data", run_name="__main__")
    place = capsys.readouterr().out.strip()
    assert place.startswith(str(tmp_path / "data" / "folder" / "images-"))


def test_hidden_folders_are_no_classes_and_a_loop_is_walked_once(tmp_path):
    for name in ("cat", "dog", ".thumbs"):
        place = tmp_path / "images" / name
        place.mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 20 * i).save(place / f"{i}.png")
    (tmp_path / "images" / "cat" / "loop").symlink_to(tmp_path / "images")
    splits = [
        load(f"folder:{tmp_path / 'images'}", split, data_dir=tmp_path / "data", image_size=8)
        for split in ("train", "test")
    ]
    assert splits[0][1].classes == 2
    assert sum(len(arrays["x"]) for arrays, _ in splits) == 6
