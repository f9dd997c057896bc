"""Crops and flips of training images: what may come, how often, and of what it is a function."""

import collections

import numpy as np
import pytest

from genjax.data import crop_and_flip

X = np.arange(2 * 5 * 4 * 1, dtype=np.uint8).reshape(2, 5, 4, 1)


def moves(image, shift, flip):
    """Every image that may come, by padding, cropping and turning."""
    wide = np.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="edge")
    height, width, _ = image.shape
    crops = [
        wide[r : r + height, c : c + width]
        for r in range(2 * shift + 1)
        for c in range(2 * shift + 1)
    ]
    return [c for crop in crops for c in ([crop, crop[:, ::-1]] if flip else [crop])]


@pytest.mark.parametrize(("shift", "flip"), [(1, False), (0, True), (1, True)])
def test_every_move_comes_equally_often(shift, flip):
    many = np.repeat(X[:1], 9000, axis=0)
    got = collections.Counter(
        image.tobytes() for image in crop_and_flip(many, seed=0, step=0, shift=shift, flip=flip)
    )
    allowed = {image.tobytes() for image in moves(X[0], shift, flip)}
    assert set(got) == allowed
    counts = np.array(list(got.values()))
    expected = 9000 / len(allowed)
    chi_square = np.sum((counts - expected) ** 2) / expected
    assert chi_square < len(allowed) + 5 * np.sqrt(2 * len(allowed))


def test_is_a_function_of_seed_step_and_place():
    many = np.random.default_rng(0).integers(0, 256, (8, 5, 4, 3), np.uint8)
    whole = crop_and_flip(many, seed=3, step=7, shift=2, flip=True)
    assert whole.dtype == np.uint8
    parts = [
        crop_and_flip(many[i : i + 4], seed=3, step=7, shift=2, flip=True, first_row=i)
        for i in (0, 4)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    for seed, step in ((3, 8), (4, 7)):
        assert (crop_and_flip(many, seed=seed, step=step, shift=2, flip=True) != whole).any()
    np.testing.assert_array_equal(crop_and_flip(many, seed=0, step=0), many)


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    with pytest.raises(ValueError, match="x must have rank 4"):
        crop_and_flip(X[0], seed=0, step=0)
    with pytest.raises(ValueError, match="shift must"):
        crop_and_flip(X, seed=0, step=0, shift=5)
    with pytest.raises(ValueError, match="shift must"):
        crop_and_flip(X, seed=0, step=0, shift=-1)
