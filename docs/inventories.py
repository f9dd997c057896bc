"""Where jax, flax and optax document what we name, for links without a network.

Sphinx asks their sites for the whole list; where they cannot be reached it takes these names.
"""

import zlib
from pathlib import Path

SITES = {
    "jax": "https://docs.jax.dev/en/latest/",
    "flax": "https://flax.readthedocs.io/en/latest/",
    "optax": "https://optax.readthedocs.io/en/latest/",
}
# name: (role, page); `$` stands for the name.
FUNCTIONS = [
    "jax.jit",
    "jax.grad",
    "jax.vmap",
    "jax.custom_vjp",
    "jax.checkpoint",
    "jax.random.key",
    "jax.random.split",
    "jax.random.fold_in",
    "jax.lax.scan",
    "jax.nn.dot_product_attention",
]
NAMES = {
    "jax": {
        "jax.Array": ("class", "_autosummary/$.html#$"),
        "jax.typing.ArrayLike": ("data", "jax.typing.html#$"),
        "jax.sharding.Mesh": ("class", "jax.sharding.html#$"),
        **dict.fromkeys(FUNCTIONS, ("function", "_autosummary/$.html#$")),
    },
    "flax": {"flax.linen.Module": ("class", "api_reference/flax.linen/module.html#$")},
    "optax": {"optax.GradientTransformation": ("class", "api/transformations.html#$")},
}


def write(site: str, folder: Path) -> Path:
    """An inventory in the format of Sphinx, version 2."""
    lines = [
        f"{name} py:{role} 1 {page.replace('$', name)} -\n"
        for name, (role, page) in NAMES[site].items()
    ]
    head = f"# Sphinx inventory version 2\n# Project: {site}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    folder.mkdir(exist_ok=True)
    path = folder / f"{site}.inv"
    path.write_bytes(head.encode() + zlib.compress("".join(lines).encode()))
    return path


def mapping(folder: Path) -> dict[str, tuple[str, tuple[str | None, str]]]:
    """The setting `intersphinx_mapping`."""
    return {site: (url, (None, str(write(site, folder)))) for site, url in SITES.items()}
