"""Programs for pods: what is read from a compiled program, and that shards make it smaller."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import pods

HLO = """
  %ar = (f32[8,4]{1,0}, bf16[2]{0}) all-reduce(%a, %b), replica_groups={}
  %ag = f32[16]{0} all-gather(%c), dimensions={0}
  %s = (f32[4]{0}, f32[32]{0}) all-gather-start(%d), dimensions={0}
  %d = f32[32]{0} all-gather-done(%s)
"""


def test_collectives_are_counted_with_their_bytes():
    found = pods.collectives(HLO)
    assert found["collectives"] == {"all-reduce": 1, "all-gather": 2}
    assert found["collective_mb"] == round((8 * 4 * 4 + 2 * 2 + 64 + 4 * 36) / 1e6, 2)


def test_a_program_on_the_emulated_devices():
    mesh = Mesh(jax.devices(), ("data",))
    x = jax.ShapeDtypeStruct(
        (80, 3), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    row = pods.measured(pods.Program(jax.jit(lambda x: jnp.sum(x)), (x,)))
    assert row["parameters"] == 240
    assert row["arguments_mb"] == pytest.approx(240 * 4 / 8 / 1e6, abs=1e-2)
    assert row["collectives"]["all-reduce"] == 1
    text = pods.table([{"program": "a", **row}, {"program": "b", "error": "too large"}])
    assert "1 all-reduce" in text
    assert "does not compile: too large" in text


def test_names_are_checked():
    with pytest.raises(ValueError, match="only must be one of"):
        pods.main(pods.Config(only=("vea",)))


@pytest.mark.slow
def test_shards_need_an_eighth_of_the_arguments():
    mesh = Mesh(jax.devices(), ("data",))
    whole, parts = (pods.measured(pods.large("dit_b", s, mesh)) for s in ("replicated", "fsdp"))
    assert parts["arguments_mb"] < whole["arguments_mb"] / 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "gan", "masked_diffusion"])
def test_experiments_have_a_step_and_a_sampler(name):
    mesh = Mesh(jax.devices()[:2], ("data",))
    found = dict(pods.experiment(name, {}, mesh))
    assert set(found) == {"step", "sampler"}
    for program in found.values():
        program.function.lower(*program.arguments)
