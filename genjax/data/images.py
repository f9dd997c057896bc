"""Image data sets by their tfds name, read through `as_data_source`: no TensorFlow anywhere."""

import contextlib
import functools
import io
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

# Anything tfds knows by name loads; these are the ones that messages and help texts show.
IMAGES = ("digits", "mnist", "fashion_mnist", "cifar10", "celeb_a")


class ImageRecords:
    """One split on disk, read by index: "x" the images and, where there are classes, "label"."""

    def __init__(self, source: Any, has_label: bool):
        self.source = source
        self.has_label = has_label

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Read the examples at `indices`, in that order."""
        records = self.source.__getitems__([int(i) for i in indices])
        arrays = {"x": np.stack([record["image"] for record in records])}
        if self.has_label:
            arrays["label"] = np.array([record["label"] for record in records], np.int32)
        return arrays


def open_images(
    name: str, split: str, data_dir: str | os.PathLike | None
) -> tuple[ImageRecords, tuple[int, ...], int | None]:
    """Open a split, preparing the data set if it is not on disk: (records, shape, classes).

    Raises ValueError for a split or a data set without fixed-size uint8 images, RuntimeError where
    the data set is not on disk and cannot be prepared here.
    """
    builder = _builder(name, data_dir)
    features = builder.info.features
    if "image" not in features or features["image"].np_dtype != np.uint8:
        raise ValueError(f"{name} must have uint8 images under 'image', got {list(features)}")
    shape = tuple(features["image"].shape)
    if None in shape:
        raise ValueError(f"{name} must have images of one size, got shape {shape}")
    if not builder.is_prepared():
        prepare(name, data_dir)
        builder = _builder(name, data_dir)
    splits = list(builder.info.splits)
    if split.split("[")[0] not in splits:
        raise ValueError(f"split must be one of {splits} for {name}, got {split!r}")
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError as error:  # on disk, but as TFRecords
        reason = "what is there is not in the array_record format"
        raise _unprepared(name, builder.data_dir_root, reason) from error
    classes = features["label"].num_classes if "label" in features else None
    return ImageRecords(source, classes is not None), shape, classes


def prepare(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Write a data set to disk (downloading it where it must be) and return its folder.

    Several processes may do this at once: each writes a folder of its own, and the first to finish
    renames it into place.
    """
    builder = _builder(name, data_dir)
    target, root = Path(builder.data_dir), Path(builder.data_dir_root)
    if builder.is_prepared():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f"preparing_{name}_") as scratch:
        builder = _builder(name, scratch)
        try:
            _reach(builder)
            quiet = contextlib.ExitStack()
            if name == "digits":  # a second's work: not worth four progress bars
                quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
                quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
            with quiet:
                builder.download_and_prepare(download_dir=str(root / "downloads"))
        except Exception as error:
            raise _unprepared(name, root, f"{type(error).__name__}: {error}"[:200]) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(builder.data_dir, target)
        except OSError:
            if not (target / "dataset_info.json").exists():
                raise
    return target


def _builder(name: str, data_dir: str | os.PathLike | None) -> Any:
    data_dir = None if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    if name == "digits":
        from genjax.data.digits import Digits

        make = Digits
    else:
        import tensorflow_datasets as tfds

        make = functools.partial(tfds.builder, name)
    absl = logging.getLogger("absl")
    was_disabled, absl.disabled = absl.disabled, True  # tfds warns of folders that are yet to come
    try:
        return make(data_dir=data_dir, file_format="array_record")
    finally:
        absl.disabled = was_disabled


def known_to_tfds() -> list[str]:
    """List the names that tfds can build."""
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)


def _reach(builder: Any) -> None:
    """Try the first address once: tfds alone would try for minutes before it gives up."""
    import requests

    for url in list(builder.url_infos or {})[:1]:
        requests.head(url, timeout=10)


def _unprepared(name: str, root: str | os.PathLike, reason: str) -> RuntimeError:
    return RuntimeError(
        f"{name} is not prepared under {root} and cannot be prepared here ({reason}). Where there "
        f"is a network, run: python -m genjax.data {name} --data-dir {root}"
    )
