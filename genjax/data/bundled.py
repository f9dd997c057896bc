"""What tfds builders of digits have in common whose images a Python package ships: no download."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds


class Scans(NamedTuple):
    """All images and labels, and the indices to train and to test on, in the order on disk."""

    images: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray


class BundledDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images uint8 of `SHAPE` and labels 0..9; a builder gives `scans` and the other constants."""

    SHAPE: tuple[int, int, int]
    DESCRIPTION: str

    def scans(self) -> Scans:
        """Read what is shipped."""
        raise NotImplementedError

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Tensor(shape=self.SHAPE, dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # the order on disk is that of the permutation
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        found = self.scans()
        return {
            "train": self._examples(found.images, found.labels, found.train),
            "test": self._examples(found.images, found.labels, found.test),
        }

    def _generate_examples(self, **kwargs: Any) -> Any:  # tfds asks for it by this name
        return self._examples(**kwargs)

    def _examples(
        self, images: np.ndarray, labels: np.ndarray, order: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for position, index in enumerate(order):
            yield position, {"image": images[index], "label": int(labels[index])}
