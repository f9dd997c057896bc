"""Image data sets by their tfds name, read through `as_data_source`: no TensorFlow anywhere."""

import os
from typing import Any

import numpy as np

from genjax import checks
from genjax.data.preparing import builder_of, is_prepared, prepare

# Anything tfds knows by name loads; these are the ones that messages and help texts show.
IMAGES = ("digits", "mnist_5k", "mnist", "fashion_mnist", "cifar10", "celeb_a")


class ImageRecords:
    """One split on disk, read by index: "x" the images and, where there are classes, "label"."""

    def __init__(self, source: Any, has_label: bool, folder: str = ""):
        self.source = source
        self.has_label = has_label
        self.folder = folder

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Read the examples at `indices`, in that order.

        Raises OSError where the folder is gone or damaged.
        """
        try:
            records = self.source.__getitems__([int(i) for i in indices])
        except (RuntimeError, OSError) as error:  # array_record names neither folder nor remedy
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise OSError(
                f"the data in {self.folder} cannot be read ({reason}): put the folder back"
            ) from error
        arrays = {"x": np.stack([record["image"] for record in records])}
        if self.has_label:
            arrays["label"] = np.array([record["label"] for record in records], np.int32)
        return arrays


def open_images(
    name: str, split: str, data_dir: str | os.PathLike | None, options: Any = None
) -> tuple[ImageRecords, tuple[int, ...], int | None]:
    """Open a split, preparing the data set if it is not on disk: (records, shape, classes).

    Raises ValueError for a split or a data set without fixed-size uint8 images, RuntimeError where
    the data set is not on disk and cannot be prepared here. options: of a folder of images.
    """
    builder = builder_of(name, data_dir, options)
    features = builder.info.features
    if "image" not in features or features["image"].np_dtype != np.uint8:
        raise ValueError(f"{name} must have uint8 images under 'image', got {list(features)}")
    shape = tuple(features["image"].shape)
    if None in shape:
        raise ValueError(f"{name} must have images of one size, got shape {shape}")
    if not is_prepared(builder):
        prepare(name, data_dir, options)
        builder = builder_of(name, data_dir, options)
    splits = list(builder.info.splits)
    if split.split("[")[0] not in splits:
        raise ValueError(f"split must be one of {splits} for {name}, got {split!r}")
    source = builder.as_data_source(split=split)
    classes = features["label"].num_classes if "label" in features else None
    folder = str(builder.data_dir)
    return ImageRecords(source, classes is not None, folder), shape, classes


def known_to_tfds() -> list[str]:
    """List the names that tfds can build."""
    with checks.extra("data", "a data set by name"):
        import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)
