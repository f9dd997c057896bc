"""Image folders and texts with anything in them: what was read, or one line that names the file."""

import io
import logging
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from genjax.data import load, text
from tests.test_fuzz import damaged, fuzz


def encoded(kind, size=(9, 7)):
    """One image as the bytes of a file."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def attempt(read):
    """What is read, or the line that says why not."""
    try:
        return read(), ""
    except ValueError as error:
        line = str(error)
    assert "\n" not in line
    return None, line


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with ten images, the last of which the test replaces."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(9):
        (folder / f"{i}.png").write_bytes(encoded("PNG"))
    return folder


@pytest.mark.usefixtures("unchecked")
@fuzz(25)
@given(st.data())
def test_a_damaged_image_is_named_or_read(images, tmp_path, caplog, data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG"]))
    path = images / f"last.{kind.lower()}"
    path.write_bytes(data.draw(damaged(encoded(kind))))
    options = {"image_size": 4, "data_dir": tmp_path / str(len(list(tmp_path.iterdir())))}
    read, refusal = attempt(lambda: load(f"folder:{images}", "train", **options)[0])
    if refusal:
        assert str(path) in refusal
        assert not [p for p in options["data_dir"].rglob("*") if p.is_file()]
        with caplog.at_level(logging.WARNING, "genjax"):
            read = load(f"folder:{images}", "train", unreadable="skip", **options)[0]
        assert str(path) in caplog.text
    path.unlink()
    assert read["x"].shape[1:] == (4, 4, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2)])
def test_an_image_of_few_pixels_is_enlarged(tmp_path, size):
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded("PNG", size))
    name, options = f"folder:{tmp_path / 'images'}", {"image_size": 8}
    train, spec = load(name, "train", **options, data_dir=tmp_path / "data")
    assert spec.shape == (8, 8, 3)
    assert train["x"].dtype == np.uint8


@fuzz(60)
@given(st.text(min_size=1, max_size=20), st.sampled_from(["utf-8", "utf-16", "utf-32", "cp1252"]))
def test_a_text_in_another_encoding_is_named_or_kept(tmp_path, said, encoding):
    path = pathlib.Path(tmp_path, "a.txt")
    path.write_bytes(raw := said.encode(encoding, errors="replace"))
    found, refusal = attempt(lambda: text(path))
    assert found or str(path) in refusal
    if found:
        assert raw.decode()  # what was kept is UTF-8
        assert set(raw.split()) <= set((found.train + found.test).split())
