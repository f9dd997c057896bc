"""Prepare a data set on disk: python -m genjax.data mnist --data-dir DIR

A folder of images: python -m genjax.data folder:PATH --image-size 64
"""

import argparse

from genjax.data.images import IMAGES
from genjax.data.loading import check_name, folder_options
from genjax.data.preparing import prepare

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m genjax.data", description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(IMAGES)}, or any tfds image data set")
    parser.add_argument("--data-dir", default=None, help="default: tfds' own data folder")
    parser.add_argument("--image-size", type=int, help="of a folder: side of the images")
    parser.add_argument("--grey", action="store_true", help="of a folder: without colours")
    parser.add_argument("--unreadable", default="refuse", help="of a folder: refuse or skip")
    given = parser.parse_args()
    check_name(given.name)
    options = folder_options(given.name, given.image_size, given.grey, given.unreadable)
    print(prepare(given.name, given.data_dir, options))
