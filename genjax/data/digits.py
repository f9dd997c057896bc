"""scikit-learn's 8x8 digits as a tfds data set: 1,797 real scans, bundled, no download.

Importing this module registers `digits` with tfds, so `tfds.builder("digits")` works too.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from genjax import checks

NUM_TRAIN = 1437


class Digits(tfds.core.GeneratorBasedBuilder):
    """Images uint8 [8, 8, 1] in 0..16 and labels 0..9; 1,437 to train on, 360 to test on.

    The split is fixed: `numpy.random.default_rng(0).permutation(1797)`, the first 1,437 train.
    Source: E. Alpaydin, C. Kaynak, UCI "Optical Recognition of Handwritten Digits", 1998.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="8x8 scans of handwritten digits in 17 levels, bundled with scikit-learn.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # the order on disk is that of the permutation
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        with checks.extra("data", "digits"):
            from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images = digits.images.astype(np.uint8)[..., None]
        order = np.random.default_rng(0).permutation(len(images))
        return {
            "train": self._examples(images, digits.target, order[:NUM_TRAIN]),
            "test": self._examples(images, digits.target, order[NUM_TRAIN:]),
        }

    def _generate_examples(self, **kwargs: Any) -> Any:  # tfds asks for it by this name
        return self._examples(**kwargs)

    def _examples(
        self, images: np.ndarray, labels: np.ndarray, order: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for position, index in enumerate(order):
            yield position, {"image": images[index], "label": int(labels[index])}
