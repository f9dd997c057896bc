import asyncio
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.training import CheckpointError, Checkpoints, checkpoint, data_mesh, init_state
from genjax.training.parallel import replicate


def make_state(step=0, width=3):
    params = {"w": jnp.arange(2.0 * width).reshape(2, width), "half": jnp.ones(4, jnp.bfloat16)}
    params["list"] = [jnp.full(2, 0.1 + step)]
    state = init_state(params, optax.adam(0.1), jax.random.key(3), ema_decays=(0.9,))
    return state.replace(step=jnp.int32(step))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def saved(tmp_path):
    """A folder with whole checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, make_state(1))
    checkpoints.save(2, make_state(2))
    checkpoints.close()
    return tmp_path / "checkpoints"


def test_round_trip(saved):
    step, state = Checkpoints(saved).restore(make_state())
    assert step == 2
    same(state, make_state(2))
    same(Checkpoints(saved).read(1, make_state()), make_state(1))


def test_every_leaf_comes_back_as_it_was_or_is_refused_by_name(tmp_path):
    state = {
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "integers": [jnp.array([2**24 + 1], jnp.int32), np.array(2**40), jnp.ones(2, jnp.int4)],
        "numbers": (3, -0.1, True, 1 - 2j, np.float32(0.1), None, {}),
        "odd/name.": {"": jnp.array([jnp.inf, jnp.nan], jnp.float8_e5m2)},
        "complex": jnp.array([1j, 2.0]),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
    }
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state)
    _, back = checkpoints.restore(state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert type(a) is type(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        if b is back["keys"]:
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for message, like in {
        "not key": {**state, "keys": jax.random.split(jax.random.key(3, impl="unsafe_rbg"), 2)},
        "numbers/0 is int": {**state, "numbers": (3.0, *state["numbers"][1:])},
    }.items():
        with pytest.raises(CheckpointError, match=message):
            checkpoints.read(1, like)
    for refused in ("text", np.array(["text"]), 2**70, print):
        with pytest.raises(TypeError, match=r"carry/1 cannot be saved: .* is not a number"):
            checkpoints.save(2, {"carry": [1, refused]})
    with pytest.raises(ValueError, match="two leaves of the state have the name 'a/b'"):
        checkpoints.save(2, {"a": {"b": 1}, "a/b": 2})
    with pytest.raises(ValueError, match="at least one array"):
        checkpoints.save(2, {"a": None})
    checkpoints.save(2, {"only": np.zeros(0)})
    checkpoints.close()
    assert checkpoints.read(2, {"only": np.zeros(0)})["only"].shape == (0,)


def test_nothing_saved_yet(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(make_state()) is None


def test_one_device_and_eight_read_each_other(saved, tmp_path):
    eight = replicate(data_mesh(), make_state())
    _, state = Checkpoints(saved).restore(eight)  # written by one
    assert len(state.params["w"].sharding.device_set) == 8
    same(state, make_state(2))
    other = Checkpoints(tmp_path / "eight")
    other.save(2, state)
    other.close()
    _, back = Checkpoints(tmp_path / "eight").restore(make_state())
    assert len(back.params["w"].sharding.device_set) == 1
    same(back, make_state(2))


@pytest.mark.parametrize(
    ("mode", "bounds", "kept", "best"),
    [
        ("min", [5.0, 1.0, 4.0, 3.0], [1, 3, 4], 1),
        ("max", [5.0, 1.0, 4.0, 3.0], [0, 3, 4], 0),
        # What is not finite is never the best: the first of all, after the best, between them.
        ("min", [np.nan, 0.7, np.nan, 0.7], [1, 3, 4], 1),
        ("max", [np.inf, 0.2, np.nan, 0.1], [1, 3, 4], 1),
    ],
)
def test_keeps_the_newest_and_the_best(tmp_path, mode, bounds, kept, best):
    checkpoints = Checkpoints(tmp_path / "c", keep=2, best="bound", mode=mode)
    for step, bound in enumerate(bounds):
        checkpoints.save(step, make_state(step), {"bound": bound, "other": step})
    checkpoints.save(4, make_state(4))  # without an evaluation
    checkpoints.wait()
    assert checkpoints.steps() == kept
    step, state = checkpoints.restore_best(make_state())
    assert step == best
    same(state, make_state(best))
    checkpoints.close()


def test_no_best_where_every_score_is_nan(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", best="fid")
    checkpoints.save(1, make_state(1), {"eval/fid": np.nan})
    checkpoints.close()
    assert checkpoints.restore_best(make_state()) is None
    with pytest.raises(ValueError, match=r"must hold best = 'fid', got \['eval/loss', 'kid'\]"):
        checkpoints.save(2, make_state(2), {"eval/loss": 1.0, "kid": 2.0})


def test_a_saved_state_does_not_change_with_its_buffers(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    state = make_state(1)
    checkpoints.save(1, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    overwrite((state.params, state.opt_state))
    checkpoints.close()
    same(checkpoints.read(1, make_state()), make_state(1))


def test_a_damaged_step_can_be_saved_again(saved, caplog):
    (saved / "2" / "record" / "metadata").write_text("{")
    checkpoints = Checkpoints(saved)
    assert checkpoints.restore(make_state())[0] == 1
    checkpoints.save(2, make_state(2))
    checkpoints.close()
    assert checkpoints.restore(make_state())[0] == 2
    assert (saved.with_name("checkpoints-damaged") / "2").is_dir()


def test_foreign_checkpoints_are_refused_and_left_alone(saved):
    with pytest.raises(
        CheckpointError, match=r"params/w is float32 \[2, 3\], not float32 \[2, 5\]"
    ):
        Checkpoints(saved).restore(make_state(width=5))
    other = init_state({"kernel": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(CheckpointError, match="it has no params/kernel"):
        Checkpoints(saved).restore(other)
    (saved / "7").mkdir()
    assert Checkpoints(saved).restore(make_state())[0] == 2
    assert Checkpoints(saved).steps() == [1, 2]


def test_bad_input(tmp_path, unchecked):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match=r"mode must be one of \['min', 'max'\], got 'least'"):
        Checkpoints(tmp_path, mode="least")
    with pytest.raises(ValueError, match="best must name a metric"):
        Checkpoints(tmp_path).restore_best(make_state())


def test_a_damaged_best_gives_way_to_the_next_best(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path / "c", best="a")
    for step, score in ((1, 0.1), (2, 0.3), (3, 0.2), (4, 0.4)):
        checkpoints.save(step, make_state(step), {"a": score})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3, 4]
    for path in (tmp_path / "c" / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"?")
    step, state = Checkpoints(tmp_path / "c", best="a").restore_best(make_state())
    assert step == 3
    same(state, make_state(3))
    assert "going back to step 3" in caplog.text
    assert (tmp_path / "c-damaged" / "1").is_dir()
    with pytest.raises(CheckpointError, match="not of this run or is damaged"):
        Checkpoints(tmp_path / "c", best="a").restore_best(make_state(width=5))
    assert Checkpoints(tmp_path / "c").steps() == [2, 3, 4]


def test_a_restored_step_is_on_the_disk(saved):
    """An error before the next step asks for it to be saved again."""
    checkpoints = Checkpoints(saved)
    checkpoints.restore(make_state())
    checkpoints.save(2, make_state(2))
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize(("folder", "told"), [("orbax", 0), ("another", 1)])
def test_a_failed_task_of_orbax_is_not_logged_beside_the_error(folder, told, caplog):
    checkpoint._orbax()
    names = {}
    fails = "async def fails():\n    raise OSError('No space left on device')"
    exec(compile(fails, f"/{folder}/handlers.py", "exec"), names)

    async def main():
        task = asyncio.ensure_future(names["fails"]())
        await asyncio.wait([task])

    asyncio.run(main())
    gc.collect()
    assert [record.name for record in caplog.records] == ["asyncio"] * told
