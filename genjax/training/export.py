"""Parameters as a plain .npz: readable by numpy alone, no orbax and no pickle."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax.training.state import leaf_name

__all__ = ["export_npz", "load_npz"]


def export_npz(path: str | os.PathLike, params: Any) -> None:
    """Write parameters to a plain .npz with names 'a/b/c', readable by numpy alone.

    bfloat16 is widened to float32 (exactly), which numpy can name. The file appears whole or not
    at all. Raises ValueError where two leaves would have one name.
    """
    arrays: dict[str, np.ndarray] = {}
    for key_path, x in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(key_path) or "value"
        if name in arrays:
            raise ValueError(f"two parameters would be written as {name!r}")
        x = np.asarray(x)
        arrays[name] = x if x.dtype.kind in "biufc" else x.astype(np.float32)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_npz(path: str | os.PathLike, like: Any = None) -> Any:
    """Read what `export_npz` wrote: nested dicts of numpy arrays, or the structure of `like`.

    No pickle is read. Raises ValueError naming what is missing or of another shape than in `like`.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not an .npz of parameters, or is damaged: {error}") from error
    if like is None:
        tree: dict[str, Any] = {}
        for name, x in arrays.items():
            *above, last = name.split("/")
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[last] = x
        return tree
    wanted = {leaf_name(p) or "value": x for p, x in jax.tree_util.tree_leaves_with_path(like)}
    if wanted.keys() != arrays.keys():
        lacks, extra = sorted(wanted.keys() - arrays.keys()), sorted(arrays.keys() - wanted.keys())
        raise ValueError(f"{path} lacks {lacks[:3]} and has {extra[:3]} that is not asked for")
    for name, x in wanted.items():
        if arrays[name].shape != np.shape(x):
            raise ValueError(f"{path}: {name} has shape {arrays[name].shape}, not {np.shape(x)}")
    leaves = [jnp.asarray(arrays[name], jnp.result_type(x)) for name, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
