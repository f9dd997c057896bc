"""scikit-learn's 8x8 digits as a tfds data set: 1,797 real scans, bundled, no download.

Importing this module registers `digits` with tfds, so `tfds.builder("digits")` works too.
"""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from genjax import checks
from genjax.data.bundled import BundledDigits, Scans

NUM_TRAIN = 1437


class Digits(BundledDigits):
    """Images uint8 [8, 8, 1] in 0..16 and labels 0..9; 1,437 to train on, 360 to test on.

    The split is fixed: `numpy.random.default_rng(0).permutation(1797)`, the first 1,437 train.
    Source: E. Alpaydin, C. Kaynak, UCI "Optical Recognition of Handwritten Digits", 1998.
    """

    VERSION = tfds.core.Version("1.0.0")
    SHAPE = (8, 8, 1)
    DESCRIPTION = "8x8 scans of handwritten digits in 17 levels, bundled with scikit-learn."

    def scans(self) -> Scans:
        """Read scikit-learn's file; raises ImportError where it is not installed."""
        with checks.extra("data", "digits"):
            from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images = digits.images.astype(np.uint8)[..., None]
        order = np.random.default_rng(0).permutation(len(images))
        return Scans(images, digits.target, order[:NUM_TRAIN], order[NUM_TRAIN:])
