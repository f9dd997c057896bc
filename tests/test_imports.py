"""What importing a room loads, and that no room reaches up or across."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import genjax

ROOT = pathlib.Path(__file__).parents[1]
FAMILIES = (
    "transport",
    "variational",
    "adversarial",
    "diffusion",
    "flows",
    "alignment",
    "autoregressive",
    "state_space",
)
GROUND = (
    "typing",
    "numerics",
    "checks",
    "randomness",
    "ode",
    "likelihoods",
    "divergences",
    "sharding",
)
HEAVY = (
    "flax",
    "optax",
    "orbax",
    "grain",
    "tensorflow_datasets",
    "tensorflow",
    "array_record",
    "matplotlib",
    "ott",
    "diffrax",
    "sklearn",
    "chex",
    "torch",
    "tokenizers",
)

PROBE = """
import importlib, json, sys, time
import jax
start = time.perf_counter()
import genjax
seconds = time.perf_counter() - start
listed = dir(genjax)
rooms = sorted(name for name in sys.modules if name.startswith("genjax."))
loaded = {}
for family in sys.argv[1].split(","):
    assert getattr(genjax, family) is importlib.import_module("genjax." + family)
    loaded[family] = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps({"seconds": seconds, "listed": listed, "rooms": rooms, "loaded": loaded}))
"""


@pytest.fixture(scope="module")
def probe():
    """Import everything in a fresh process, in the order of FAMILIES."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE, ",".join(FAMILIES)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_jax_and_nothing_heavy(family, probe):
    assert "jax" in probe["loaded"][family]
    assert not set(HEAVY) & set(probe["loaded"][family])


def test_import_genjax_costs_nothing_beside_jax(probe):
    assert probe["seconds"] < 0.1


def test_rooms_are_attributes_that_load_when_they_are_named(probe):
    assert probe["rooms"] == []
    found = (path for path in (ROOT / "genjax").iterdir() if path.name != "py.typed")
    folders = {path.stem for path in found if path.stem[0] != "_"}
    assert folders <= set(probe["listed"])
    assert "__version__" in probe["listed"]
    assert genjax.ode is sys.modules["genjax.ode"]
    with pytest.raises(AttributeError, match="module 'genjax' has no attribute 'transports'"):
        _ = genjax.transports
    # Those that a type checker is told of.
    assert {name for name in imports(ROOT / "genjax" / "__init__.py") if "." in name} == {
        f"genjax.{name}" for name in folders
    }


def imports(path):
    """Every module that a file imports, lazily too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
            if node.module == "genjax":
                yield from (f"genjax.{alias.name}" for alias in node.names)


def files(room):
    found = sorted((ROOT / "genjax" / room).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_stands_on_the_ground_floor_alone(family):
    for path in files(family):
        for name in imports(path):
            room = name.split(".")[1] if name.startswith("genjax.") else None
            assert room is None or room in (family, *GROUND), f"{path.name} imports {name}"
            assert name.split(".")[0] not in ("flax", "optax"), f"{path.name} imports {name}"


@pytest.mark.parametrize("room", ["networks", "data", "metrics", "training"])
def test_middle_rooms_do_not_reach_up(room):
    for path in files(room):
        for name in imports(path):
            assert not name.startswith("experiments"), f"{path.name} imports {name}"
            assert room == "networks" or name.split(".")[0] != "flax", f"{path.name}: {name}"
