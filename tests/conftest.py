"""Strictness for every test: shapes checked by beartype, rank promotion and warnings are errors."""

import os

# Devices are read once, when jax starts: eight emulated ones for the parallel tests.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

install_import_hook("genjax", "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=1, help="run every test this many times")


def pytest_generate_tests(metafunc):
    rounds = metafunc.config.getoption("rounds")
    if rounds > 1:
        metafunc.fixturenames.append("round_number")
        metafunc.parametrize("round_number", range(rounds), ids="round{}".format)


@pytest.fixture
def x64():
    """Run the test with 64-bit types."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked():
    """Switch the typechecker off, so that the library's own errors are seen, as users see them."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(params=["eager", "jit"])
def compiled(request):
    """The transformation under which a function is tested: itself, or jax.jit of it."""
    return jax.jit if request.param == "jit" else (lambda f: f)


@pytest.fixture
def key():
    return jax.random.key(0)
