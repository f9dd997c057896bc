"""Prepare a data set on disk: python -m genjax.data mnist --data-dir DIR"""

import argparse

from genjax.data.images import IMAGES
from genjax.data.loading import check_name
from genjax.data.preparing import prepare

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m genjax.data", description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(IMAGES)}, or any tfds image data set")
    parser.add_argument("--data-dir", default=None, help="default: tfds' own data folder")
    arguments = parser.parse_args()
    check_name(arguments.name)
    print(prepare(arguments.name, arguments.data_dir))
