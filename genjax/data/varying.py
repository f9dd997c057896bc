"""Random crops and flips of training images, a function of (seed, step) as batches are."""

import numpy as np

from genjax import checks

__all__ = ["crop_and_flip"]


def crop_and_flip(
    x: np.ndarray, *, seed: int, step: int, shift: int = 0, flip: bool = False, first_row: int = 0
) -> np.ndarray:
    """Move each image of a batch by whole pixels, and turn it left to right by chance.

    x: [batch, height, width, channels]. shift: at most so many pixels up, down, left and right,
    each move as likely as the others; the border is repeated (a crop of the padded image). flip:
    left to right with probability 1/2; not for digits or text, whose meaning it changes.
    first_row: the place of row 0 in the batch of all processes; a row's move depends on its place
    alone.

    Raises ValueError unless x has rank 4, and for a shift below 0 or above a side.

    >>> x = np.arange(16.0).reshape(1, 4, 4, 1)
    >>> crop_and_flip(x, seed=0, step=3, shift=1).shape
    (1, 4, 4, 1)
    """
    checks.rank("x", x, 4)
    checks.integer("shift", shift, 0)
    n, height, width, _ = x.shape
    checks.between("shift", shift, 0, min(height, width))
    drawn = np.random.default_rng((seed, step, 1)).random((first_row + n, 3))[first_row:]
    down, right = (np.floor(drawn[:, :2] * (2 * shift + 1)).astype(int) - shift).T
    columns = np.broadcast_to(np.arange(width), (n, width))
    if flip:
        columns = np.where(drawn[:, 2:] < 0.5, columns, columns[:, ::-1])
    rows = np.clip(np.arange(height) + down[:, None], 0, height - 1)
    columns = np.clip(columns + right[:, None], 0, width - 1)
    return x[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
