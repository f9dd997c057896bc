"""The programs of other projects run as they stand, and a package that is missing is named."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import (
    equinox_flow_matching,
    nnx_vae,
    plain_f_gan,
    sampler_of_a_function,
    sinkhorn_optax,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_programs_reach_what_they_are_for():
    assert nnx_vae.main(150) < 10.0  # fair coins: 11.09 nats
    assert abs(equinox_flow_matching.main(200) - 3) < 0.3
    assert abs(plain_f_gan.main(600) - 2) < 0.4
    assert abs(sampler_of_a_function.main() - 1) < 0.03
    assert sinkhorn_optax.main(60) < 0.1


BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

sys.meta_path.insert(0, Missing())
import jax.numpy as jnp
import numpy as np
import genjax

def attempt(name, use):
    try:
        use()
    except ImportError as error:
        print(name, "|", error)
    else:
        print(name, "| nothing is missing")

attempt("transport", lambda: genjax.transport)
attempt("networks", lambda: genjax.networks)
attempt("ott", lambda: genjax.transport.sinkhorn_from_ott(None))
field = lambda args, y, t: y
attempt("ode", lambda: genjax.ode.solve(field, (), jnp.ones(1), (0.0, 1.0), method="dopri5"))
attempt("images", lambda: genjax.data.load("digits", "train"))
attempt("train", lambda: genjax.training.fit(None, None, None, num_steps=1, folder="x"))
attempt("text", lambda: genjax.data.tokeniser(b"some text to learn from", 257))
"""


def test_a_missing_package_is_named_with_its_extra():
    packages = "flax,optax,orbax,tqdm,ott,diffrax,tensorflow_datasets,tokenizers,sklearn,grain"
    command = [sys.executable, "-c", BLOCKED, packages]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    assert told["transport"] == "nothing is missing"
    assert told["networks"] == "genjax.networks needs flax: pip install 'genjax-models[networks]'"
    for name, extra in {"ott": "ott", "images": "data", "train": "train", "text": "text"}.items():
        assert f"pip install 'genjax-models[{extra}]'" in told[name], told
    assert "ode" in told["ode"], told
