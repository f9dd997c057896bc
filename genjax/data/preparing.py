"""Write an image data set to disk with tfds and without TensorFlow: safe to run twice at once."""

import contextlib
import functools
import importlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from genjax import checks

FOLDER = "folder:"
# Data sets of our own, from packages that ship them: the module and the class of the builder.
BUNDLED = {
    "digits": ("genjax.data.digits", "Digits"),
    "mnist_5k": ("genjax.data.mnist_5k", "Mnist5k"),
}


class NotPreparedError(RuntimeError):
    """A data set is not on disk and cannot be brought there from here, or is there in a format that
    needs TensorFlow; the message says what can be done."""


def builder_of(name: str, data_dir: str | os.PathLike | None, options: Any = None) -> Any:
    """Make the tfds builder of a data set, its files in the array_record format.

    options: of a folder of images, `genjax.data.folder.Options`. Raises NotPreparedError where
    the data set is on disk in another format.
    """
    data_dir = None if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    with checks.extra("data", f"data set {name}"):
        import tensorflow_datasets as tfds
    if name.startswith(FOLDER):
        from genjax.data.folder import Options, folder_builder

        make = functools.partial(folder_builder, name, options=options or Options())
    elif name in BUNDLED:
        module, builder = BUNDLED[name]
        make = getattr(importlib.import_module(module), builder)
    else:
        make = functools.partial(tfds.builder, name)
    try:
        with _without_warnings():
            return make(data_dir=data_dir, file_format="array_record")
    except ValueError as error:
        if "format is already set" not in str(error):
            raise
        raise NotPreparedError(
            f"{name} is on disk under {data_dir or 'the data folder of tfds'}, but not in the "
            "array_record format, which is read without TensorFlow; prepare it in another folder: "
            f"python -m genjax.data {name} --data-dir DIR"
        ) from error


def is_prepared(builder: Any) -> bool:
    """Say whether the builder's data set is on disk, whole."""
    with _without_warnings():
        return builder.is_prepared()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence tfds, which warns of folders that are yet to come."""
    absl = logging.getLogger("absl")
    was_disabled, absl.disabled = absl.disabled, True
    try:
        yield
    finally:
        absl.disabled = was_disabled


def prepare(name: str, data_dir: str | os.PathLike | None = None, options: Any = None) -> Path:
    """Write a data set to disk (downloading it where it must be) and return its folder.

    Several processes may do this at once: each writes a folder of its own, and the first to finish
    renames it into place. Raises NotPreparedError, a RuntimeError, where it cannot be done here,
    with the reason, and FolderError, a ValueError, for a folder of images that cannot be used;
    nothing is left there.
    """
    builder = builder_of(name, data_dir, options)
    target, root = Path(builder.data_dir), Path(builder.data_dir_root)
    if is_prepared(builder):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f"preparing_{builder.name}_") as scratch:
        builder, folder = builder_of(name, scratch, options), name.startswith(FOLDER)
        try:
            with contextlib.ExitStack() as stack:
                if name in BUNDLED or folder:  # not worth four progress bars
                    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                _reach(builder)
                stack.enter_context(tensorflow_stand_in())
                builder.download_and_prepare(download_dir=str(root / "downloads"))
        except ImportError:  # a package that ships the data is missing; the message says which
            raise
        except Exception as error:
            if folder:
                builder.report()
            raise NotPreparedError(
                f"{name} is not prepared under {root} and cannot be prepared here "
                f"({type(error).__name__}: {error}). Where there is a network, run: "
                f"python -m genjax.data {name} --data-dir {root}; or copy the folder {name} of a "
                f"machine that has it there; or take what needs no network: "
                f"{', '.join(BUNDLED)}, {FOLDER}PATH"
            ) from error
        if folder:
            builder.report()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(builder.data_dir, target)
        except OSError:
            if not (target / "dataset_info.json").exists():
                raise
    return target


@contextlib.contextmanager
def tensorflow_stand_in() -> Iterator[None]:
    """Let tfds unpack archives and encode images without TensorFlow, while the context lasts.

    tfds reads without TensorFlow, but its builders still open files through `tf.io.gfile` and
    encode PNGs with it. Here files are opened by Python and images encoded by Pillow.
    """
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.core.utils import lazy_imports_utils

    def encode(self: Any, image: np.ndarray) -> bytes:
        from PIL import Image

        pixels = image[..., 0] if image.shape[-1] == 1 else image
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=self.encoding_format)
        return buffer.getvalue()

    stand_in = SimpleNamespace(
        io=SimpleNamespace(gfile=SimpleNamespace(GFile=open)),
        compat=SimpleNamespace(as_text=os.fsdecode),
        errors=SimpleNamespace(UnimplementedError=NotImplementedError),
    )
    # tfds' modules share one lazy module, which keeps what it imported in this slot.
    lazy: Any = vars(lazy_imports_utils.tensorflow)
    encoder: Any = image_feature._ImageEncoder
    original = encoder._encode_image
    if "_module" in lazy:  # the user has TensorFlow and tfds has loaded it: nothing to do
        yield
        return
    lazy["_module"], encoder._encode_image = stand_in, encode
    try:
        yield
    finally:
        del lazy["_module"]
        encoder._encode_image = original


def _reach(builder: Any) -> None:
    """Try the first address once: tfds alone would try for minutes before it gives up."""
    import requests

    for url in list(builder.url_infos or {})[:1]:
        requests.head(url, timeout=10)
