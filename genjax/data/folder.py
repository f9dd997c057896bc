"""A folder of images as a tfds data set: cropped, resized, and written once as uint8 arrays.

folder:PATH        PATH/*.png (no labels), or PATH/CLASS/**/*.jpg (the first subfolder is the
                   label), or either of them below PATH/train and PATH/test
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from genjax import checks

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
ON_UNREADABLE = ("refuse", "skip")
TEST_SHARE = 0.1
# Part of the name under which a folder is prepared: to be raised when the pixels would change.
FORMAT = 1

log = logging.getLogger("genjax")


class FolderError(ValueError):
    """A folder of images that cannot be used as it is; the message names the files."""


class Options(NamedTuple):
    """How a folder becomes a data set, see `genjax.data.load`."""

    image_size: int | None = None
    grey: bool = False
    unreadable: str = "refuse"

    def check(self) -> None:
        """Raise by name where an option is out of range."""
        if self.image_size is not None:
            checks.integer("image_size", self.image_size, 1)
        checks.one_of("unreadable", self.unreadable, ON_UNREADABLE)


class Example(NamedTuple):
    path: Path
    label: int | None


@dataclass(eq=False)
class FolderConfig(tfds.core.BuilderConfig):
    """A folder as it was found, under a name of its own for every state of its files."""

    options: Options = field(default_factory=Options)
    shape: tuple[int, int, int] = (0, 0, 0)
    classes: tuple[str, ...] = ()
    splits: dict[str, list[Example]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    other_sizes: list[str] = field(default_factory=list)


class ImageFolder(tfds.core.GeneratorBasedBuilder):
    """Images uint8 of one shape, with a label where there are subfolders."""

    name = "folder"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        config: Any = self.builder_config
        features: dict[str, Any] = {
            "image": tfds.features.Tensor(shape=config.shape, dtype=np.uint8)
        }
        if config.classes:
            features["label"] = tfds.features.ClassLabel(names=list(config.classes))
        return tfds.core.DatasetInfo(
            builder=self,
            description="A folder of images.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config: Any = self.builder_config
        return {split: self._examples(examples) for split, examples in config.splits.items()}

    def _generate_examples(self, **kwargs: Any) -> Any:  # tfds asks for it by this name
        return self._examples(**kwargs)

    def _examples(self, examples: list[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        config: Any = self.builder_config
        for position, (path, label) in enumerate(examples):
            try:
                image = read_image(path, config.options)
            except (OSError, ValueError, SyntaxError) as error:
                config.broken.append(f"{path} ({str(error).splitlines()[0][:80]})")
                continue
            if image.shape != config.shape:
                config.other_sizes.append(f"{path} is {image.shape[0]}x{image.shape[1]}")
                continue
            yield position, {"image": image} | ({} if label is None else {"label": label})

    def report(self) -> None:
        """Raise FolderError naming files that cannot be used, or log those that are skipped."""
        config: Any = self.builder_config
        if config.other_sizes:
            height, width, _ = config.shape
            raise FolderError(
                f"images must be of one size, {height}x{width} as the first, where no image_size "
                f"is given: {config.other_sizes[0]} ({len(config.other_sizes)} such)"
            )
        if not config.broken:
            return
        more = f" and {len(config.broken) - 5} more" if len(config.broken) > 5 else ""
        listed = f"{', '.join(config.broken[:5])}{more}"
        if config.options.unreadable == "refuse":
            raise FolderError(f"images cannot be read: {listed}; mend them, or unreadable='skip'")
        log.warning("skipped %d images that cannot be read: %s", len(config.broken), listed)


def folder_builder(name: str, data_dir: Any, options: Options, file_format: str) -> ImageFolder:
    """The builder of "folder:PATH". Raises FolderError where there is nothing to read there."""
    options.check()
    if "://" in name:
        raise FolderError(f"folder:PATH must name a local folder, got {name!r}")
    root = Path(name.removeprefix("folder:")).expanduser().absolute()
    classes, splits = find_images(root)
    examples = [example for split in splits.values() for example in split]
    digest = hashlib.blake2b(repr((FORMAT, options)).encode(), digest_size=8)
    for path, _ in examples:
        found = path.stat()
        entry = (str(path.relative_to(root)), found.st_size, found.st_mtime_ns)
        digest.update(repr(entry).encode())
    tame = "".join(c if c.isalnum() else "_" for c in root.name) or "root"
    config = FolderConfig(
        name=f"{tame}-{digest.hexdigest()}",
        options=options,
        shape=_shape(examples, options),
        classes=classes,
        splits=splits,
    )
    return ImageFolder(data_dir=data_dir, config=config, file_format=file_format)


def find_images(root: Path) -> tuple[tuple[str, ...], dict[str, list[Example]]]:
    """The classes (none without subfolders), and the examples of "train" and "test".

    Without folders of these names one in ten images of each class tests, chosen by
    `numpy.random.default_rng(0)`. Raises FolderError naming what is wrong with the folder.
    """
    if not root.is_dir():
        raise FolderError(f"folder:PATH must name a folder, {root} is none")
    given = [split for split in ("train", "test") if (root / split).is_dir()]
    places = {split: root / split for split in given} if len(given) == 2 else {"all": root}
    files = {split: _files(place) for split, place in places.items()}
    for split, found in files.items():
        if not found:
            kinds = " ".join(SUFFIXES)
            raise FolderError(f"folder {places[split]} holds no image ({kinds})")
    names = {p.parts[0] if len(p.parts) > 1 else "" for found in files.values() for p in found}
    if "" in names and len(names) > 1:
        raise FolderError(f"folder {root} holds images beside subfolders, which are classes")
    classes = tuple(sorted(names - {""}))
    labelled = {
        split: [Example(places[split] / p, _label(classes, p)) for p in found]
        for split, found in files.items()
    }
    return classes, labelled if "all" not in labelled else _split(labelled["all"])


def _files(place: Path) -> list[Path]:
    """The images below, without what is hidden; a folder that links lead to again counts once."""
    kept, seen = [], set()
    for above, folders, files in os.walk(place, followlinks=True):
        real = os.path.realpath(above)
        folders[:] = [f for f in sorted(folders) if not f.startswith(".")]
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        kept += [Path(above, f) for f in files if not f.startswith(".")]
    return sorted(p.relative_to(place) for p in kept if p.suffix.lower() in SUFFIXES)


def _label(classes: tuple[str, ...], path: Path) -> int | None:
    return classes.index(path.parts[0]) if classes else None


def _split(examples: list[Example]) -> dict[str, list[Example]]:
    """Keep one in ten of each class to test on, at least one of all."""
    if len(examples) < 2:
        raise FolderError(f"a folder must hold at least 2 images, got {examples[0].path} alone")
    order = np.random.default_rng(0).permutation(len(examples))
    counts: dict[int | None, int] = {}
    test = set()
    for i in order:
        label = examples[i].label
        counts[label] = counts.get(label, 0) + 1
        # The 10th, 20th, ... of its class in this order.
        if counts[label] % round(1 / TEST_SHARE) == 0:
            test.add(int(i))
    test = test or {int(order[0])}
    parts = [[int(i) for i in order if (int(i) in test) == kept] for kept in (False, True)]
    return {
        split: [examples[i] for i in part]
        for split, part in zip(("train", "test"), parts, strict=True)
    }


def _shape(examples: list[Example], options: Options) -> tuple[int, int, int]:
    """The shape of all images: the size asked for, or that of the first that can be read."""
    if options.image_size is not None:
        return options.image_size, options.image_size, 1 if options.grey else 3
    for path, _ in examples:
        try:
            height, width, channels = read_image(path, options).shape
            return height, width, channels
        except (OSError, ValueError, SyntaxError):
            continue
    raise FolderError(f"none of {len(examples)} images can be read, the first {examples[0].path}")


def read_image(path: Path, options: Options) -> np.ndarray:
    """An image file as uint8 [height, width, 1 or 3]: upright, on white where it is transparent.

    With an image size: the largest square in the middle, resized with Lanczos' filter. Raises
    OSError, ValueError or SyntaxError (Pillow's) for a file that is no whole image, ValueError for
    pixels of 32 bits, integer or floating, which do not say which number is white.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        image: Any = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):  # 16 bits of grey, which Pillow also has as 32
            grey = np.asarray(image)
            if grey.dtype.kind == "f" or grey.min() < 0 or grey.max() > 65535:
                raise ValueError("32 bits a pixel: save it with 8 or 16")
            image = Image.fromarray((grey.astype(np.int64) >> 8).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("L" if options.grey else "RGB")
    if options.image_size is not None:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        # Cut first: the filter would read beyond a `box`.
        image = image.crop((left, top, left + side, top + side))
        size = (options.image_size, options.image_size)
        image = image.resize(size, Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
