"""Short runs of bridges, whole: what they write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _system, bridge

QUICK = bridge.Config(
    pairs="fitting", width=8, depth=1, steps=4, steps_per_call=2, batch_size=16, num_steps=4,
    simulate=2, devices=1, progress=False,
)  # fmt: skip


@pytest.mark.slow
def test_a_short_run_leaves_its_files(tmp_path):
    folder = tmp_path / "run"
    summary = bridge.main(dataclasses.replace(QUICK, run_dir=str(folder)))
    assert np.isfinite([summary["path_squared"], summary["sliced_wasserstein"]]).all()
    assert (folder / "paths.png").stat().st_size > 1000
    assert _system.reopen(folder)[2].pairs == "fitting"


@pytest.mark.slow
def test_the_coupling_is_the_entropic_plan_of_half_the_cost():
    """p_ij ~ exp((f_i + g_j - c_ij / 2) / sigma^2): log-ratios around a square are those of c."""
    cost = jax.random.uniform(jax.random.key(0), (3, 3))
    found = jnp.log(bridge.plan(0.8)(cost))
    square = lambda a: a[0, 0] + a[1, 1] - a[0, 1] - a[1, 0]  # noqa: E731
    np.testing.assert_allclose(square(found), -square(cost) / 2 / 0.8**2, rtol=1e-4)


@pytest.mark.slow
def test_entropic_pairs_shorten_the_paths(tmp_path):
    lengths = {}
    for pairs in ("independent", "entropic"):
        config = bridge.Config(
            pairs=pairs, width=32, depth=2, steps=300, steps_per_call=50, batch_size=128,
            num_steps=20, run_dir=str(tmp_path / pairs), devices=1, progress=False,
        )  # fmt: skip
        lengths[pairs] = bridge.main(config)["path_squared"]
    assert lengths["entropic"] < 0.85 * lengths["independent"]


def test_a_source_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="source must be normal for images"):
        bridge.main(dataclasses.replace(QUICK, dataset="digits"))
    with pytest.raises(ValueError, match="did you mean 'moons'"):
        bridge.main(dataclasses.replace(QUICK, source="moon"))
