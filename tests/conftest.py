"""Strictness for every test: shapes checked by beartype, rank promotion and warnings are errors."""

import gc
import os
import pathlib
import shutil
import threading

# Devices are read once, when jax starts: eight emulated ones for the parallel tests. On a busy
# machine one of them may wait for a core longer than the 40 seconds after which XLA gives up.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Compiled programs are kept between runs, for both workers and for the processes that tests start:
# a program of one operation takes 16 ms to compile and 5 ms to read.
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# An old cache holds programs of old code: beyond this many bytes it is begun anew.
CACHE_LIMIT = 2**30
# Compiled programs held in memory are dropped between two files beyond this many bytes.
MEMORY_LIMIT = 1.5 * 2**30

from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

install_import_hook("genjax", "beartype.beartype")

import functools

import flax.linen
import jax
import pytest
from jax._src.interpreters import mlir

jax.config.update("jax_numpy_rank_promotion", "raise")

# Parameters are made by one program, as in the experiments, and not by one for each operation.
# What a network is called with stays known, so that it is checked as ever.
_init = flax.linen.Module.init


@functools.wraps(_init)
def _compiled_init(self, rngs, *args, **kwargs):
    return jax.jit(lambda rngs: _init(self, rngs, *args, **kwargs))(rngs)


flax.linen.Module.init = _compiled_init

# Every program is lowered in an MLIR context of its own, and loading the dialects into it, in jax
# and again in XLA, takes 4 to 8 ms: a third of what a program of one operation takes. Here so many
# programs of a thread share a context; it goes when the last of them is dropped.
PROGRAMS_PER_CONTEXT = 32
_make_ir_context = mlir.make_ir_context
_contexts = threading.local()


def _shared_ir_context():
    if not getattr(_contexts, "left", 0):
        _contexts.shared, _contexts.left = _make_ir_context(), PROGRAMS_PER_CONTEXT
    _contexts.left -= 1
    return _contexts.shared


mlir.make_ir_context = _shared_ir_context

# Tracing makes many small objects that live: looking through them all is a sixth of the time.
gc.freeze()
gc.set_threshold(200_000, 50, 100)


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=1, help="run every test this many times")


def pytest_configure(config):
    if hasattr(config, "workerinput") or not CACHE.is_dir():
        return
    if sum(entry.stat().st_size for entry in os.scandir(CACHE)) > CACHE_LIMIT:
        shutil.rmtree(CACHE)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drop compiled programs after a file that leaves the worker large."""
    yield
    resident = pathlib.Path("/proc/self/statm")
    if not resident.exists():
        return
    if int(resident.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MEMORY_LIMIT:
        jax.clear_caches()
        gc.collect()


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


@pytest.fixture(params=[pytest.param("eager", marks=pytest.mark.slow), "jit"])
def compiled(request):
    """The transformation under which a function is tested: itself, or jax.jit of it."""
    return jax.jit if request.param == "jit" else (lambda f: f)


@pytest.fixture
def key():
    return jax.random.key(0)
