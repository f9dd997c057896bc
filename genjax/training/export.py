"""Parameters as a plain .npz: readable by numpy alone, no orbax and no pickle."""

import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax.training.state import is_key, leaf_name

__all__ = ["export_npz", "load_npz"]

WIDER = {jnp.floating: np.float32, jnp.signedinteger: np.int8, jnp.unsignedinteger: np.uint8}
KINDS = (jnp.bool_, jnp.complexfloating, *WIDER)


def export_npz(path: str | os.PathLike, params: Any) -> None:
    """Write parameters to a plain .npz with names 'a/b/c', readable by numpy alone.

    What numpy cannot name is widened exactly: bfloat16 to float32, int4 to int8. The file appears
    whole or not at all. Raises ValueError where two leaves would have one name, and TypeError by
    name for a leaf that is not of numbers.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/params.npz"
    >>> export_npz(path, {"layer": {"w": jnp.ones(2)}})
    >>> load_npz(path)["layer"]["w"].shape
    (2,)
    """
    arrays: dict[str, np.ndarray] = {}
    for key_path, x in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(key_path) or "value"
        if name in arrays:
            raise ValueError(f"two parameters would be written as {name!r}")
        arrays[name] = _plain(name, x)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # As np.savez, whose own arguments are names that it takes for no array.
        with zipfile.ZipFile(partial, "w") as file:
            for name, x in arrays.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, x, allow_pickle=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_npz(path: str | os.PathLike, like: Any = None) -> Any:
    """Read what `export_npz` wrote: nested dicts of numpy arrays, or the structure of `like`.

    Values are cast to the types of `like` within their kind (bool, signed, unsigned, floating,
    complex), where floats may be rounded. No pickle is read. Raises ValueError naming what is
    missing, of another shape or kind than in `like`, or too large for its type.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/params.npz"
    >>> export_npz(path, {"layer": {"w": jnp.ones(2)}})
    >>> load_npz(path)["layer"]["w"].shape
    (2,)
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
            if any(name[:i] in arrays for i, c in enumerate(name) if c == "/"):
                raise ValueError(f"{path}: {name} lies below another array: give `like`")
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
    leaves = [
        _cast(f"{path}: {name}", arrays[name], jnp.result_type(x)) for name, x in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _plain(name: str, x: Any) -> np.ndarray:
    """The leaf as an array of a type that numpy can name."""
    x = np.empty(0, object) if is_key(x) else np.asarray(x)
    if x.dtype.isbuiltin == 1 and x.dtype.kind in "biufc":
        return x
    for kind, wide in WIDER.items():
        if x.dtype.isbuiltin == 2 and jnp.issubdtype(x.dtype, kind):
            return x.astype(wide)
    raise TypeError(f"{name} must be an array of numbers to be written, got {x.dtype}")


def _cast(name: str, x: np.ndarray, dtype: Any) -> jax.Array:
    """Cast within a kind; raises ValueError across kinds and where the type cannot hold a value."""
    if not any(jnp.issubdtype(x.dtype, kind) and jnp.issubdtype(dtype, kind) for kind in KINDS):
        raise ValueError(f"{name} is {x.dtype}, not {dtype}")
    with np.errstate(over="ignore"):
        new = x.astype(dtype)
    lost = np.isfinite(x) & ~np.isfinite(new) if jnp.issubdtype(dtype, jnp.inexact) else new != x
    if lost.any():
        raise ValueError(f"{name} holds {x[lost][0]}, too large for {dtype}")
    return jnp.asarray(new)
