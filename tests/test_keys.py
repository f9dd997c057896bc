"""No key is used twice: two draws from one key are one draw, or overlap.

(split(key)[1] is fold_in(key, 1), and both are among the bits of a draw.)

Read from the source, notebooks too: within a function, a name such as key or key_z is passed to one
call, unless the calls are in branches that exclude each other.
"""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    *sorted((ROOT / "genjax").rglob("*.py")),
    *sorted((ROOT / "experiments").glob("*.py")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
KEY = re.compile(r"^key(_\w+)?$")
# "file: function: key" -> why the calls do not overlap.
INDEPENDENT = {
    "samplers.py: _sample: key": "the start has fold_in(key, 0), step k fold_in(key, k + 1)",
    "inpainting.py: inpaint: key": "as samplers.py's",
    "saddle.py: saddle_step: key": "critic update i has fold_in(key, i), the generator n_critic",
    "gan.py: critic_loss: key": "the noise has fold_in(key, 0), the penalty 1",
    "hierarchical_vae.py: parts: key": "of dropout: the network folds a number for each part",
    "stylegan.py: critic_loss: key": "styles have fold_in 0 and 1, images 2, augmentations 3 and 4",
    "stylegan.py: generator_loss: key": "as the critic's; the pixels of a path length have 5",
    "stylegan.py: sample: key": "z has fold_in(key, 0), images 2",
    "_vq_model.py: levels: key": "of dropout: each network folds its own number",
    "_vq_model.py: decode: key": "of dropout: each network folds its own number",
    "_vq_model.py: sample: key": "code i has fold_in(key, i), the image the number after the last",
    "vqvae.py: loss: key_drop": "of dropout: each network folds its own number",
    "vae.py: init: key": "split gives fold_in 0 and 1, the prior has 2",
    "fidelity.py: classifier_two_sample: key": "split gives fold_in 0 and 1, the order is 2",
}
DEFINITIONS = (ast.FunctionDef, ast.Lambda, ast.ClassDef)


def source(path):
    if path.suffix == ".py":
        return path.read_text()
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    lines = "\n".join("".join(c["source"]) for c in cells).splitlines()
    return "\n".join(line for line in lines if not line.startswith("%"))


def ends(block):
    return bool(block) and isinstance(block[-1], ast.Return | ast.Raise)


def uses(nodes, branch=()):
    """(name, call, branches) of every key that is passed on; a branch is (where, which side)."""
    for index, node in enumerate(nodes):
        if isinstance(node, DEFINITIONS):
            continue  # a scope of its own
        if isinstance(node, ast.If | ast.IfExp):
            sides = [node.body, node.orelse]
            sides = [s if isinstance(s, list) else [s] for s in sides]
            yield from uses([node.test], branch)
            for side, block in enumerate(sides):
                yield from uses(block, (*branch, (id(node), side)))
            if isinstance(node, ast.If) and ends(node.body):  # what follows is its other side
                yield from uses(nodes[index + 1 :], (*branch, (id(node), 1)))
                return
            continue
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(k.value for k in node.keywords)]
            for name in {a.id for a in arguments if isinstance(a, ast.Name)}:
                if KEY.match(name) and not ast.unparse(node.func).startswith("checks."):
                    yield name, ast.unparse(node), branch
        yield from uses([*ast.iter_child_nodes(node)], branch)


def exclusive(a, b):
    sides = dict(a)
    return any(sides.get(where, side) != side for where, side in b)


def indexed(call):
    """fold_in with a number of its own."""
    found = re.fullmatch(r"jax\.random\.fold_in\(\w+, (.*)\)", call)
    return found and found[1]


def reused(tree, file=""):
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.FunctionDef | ast.Module):
            continue
        name = getattr(scope, "name", "module")
        body = [n for n in scope.body if not isinstance(n, ast.Import)]
        found = {}
        for key, call, branch in uses(body):
            for other, where in found.setdefault(key, []):
                folds = indexed(call), indexed(other)
                apart = all(folds) and folds[0] != folds[1]
                if not apart and not exclusive(branch, where) and other not in call:
                    yield f"{file}: {name}: {key}"
            found[key].append((call, branch))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_key_is_used_twice(path):
    found = set(reused(ast.parse(source(path)), path.name))
    assert not found - INDEPENDENT.keys()


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        ("a = normal(key)\nb = normal(jax.random.fold_in(key, 1))", True),
        ("x = permutation(key, f(key))", True),
        ("x = normal(jax.random.fold_in(key, 0))\ny = normal(jax.random.fold_in(key, 1))", False),
        ("if x:\n    return f(key)\nreturn g(key)", False),
        ("x = f(key) if a else g(key)", False),
        ("key_a, key_b = split(key)\nf(key_a)\ng(key_b)", False),
    ],
)
def test_the_reader_of_keys(code, bad):
    body = "\n".join("    " + line for line in code.splitlines())
    assert bool(set(reused(ast.parse(f"def f(key, x, a):\n{body}")))) == bad
