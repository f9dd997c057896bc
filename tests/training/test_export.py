import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.training import export_npz, load_npz

PARAMS = {
    "dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "layers": [jnp.zeros(2, jnp.int32), jnp.full(2, 1 / 3, jnp.bfloat16)],
}


def test_the_file_is_plain(tmp_path):
    export_npz(tmp_path / "params.npz", PARAMS)
    with np.load(tmp_path / "params.npz", allow_pickle=False) as file:
        assert set(file.files) == {"dense/kernel", "dense/bias", "layers/0", "layers/1"}
        np.testing.assert_array_equal(file["dense/kernel"], PARAMS["dense"]["kernel"])
        assert file["layers/1"].dtype == np.float32
    assert [path.name for path in tmp_path.iterdir()] == ["params.npz"]


def test_round_trip(tmp_path):
    export_npz(tmp_path / "params.npz", PARAMS)
    nested = load_npz(tmp_path / "params.npz")
    np.testing.assert_array_equal(nested["dense"]["bias"], 1)
    np.testing.assert_array_equal(nested["layers"]["0"], 0)
    back = load_npz(tmp_path / "params.npz", like=PARAMS)
    assert back["layers"][1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(back["layers"][1], PARAMS["layers"][1])


def test_nothing_is_converted_in_silence(tmp_path, unchecked):
    path = tmp_path / "params.npz"
    params = {
        "file": jnp.array([2**24 + 1], jnp.int32),  # the names are arguments of np.savez
        "allow_pickle": np.array([0.1, 0.5]),
        "small": [jnp.array([-7, 3], jnp.int4), jnp.array([0.5], jnp.float8_e4m3fn)],
        "empty": jnp.zeros((2, 0)),
        "flag": True,
    }
    export_npz(path, params)
    back = load_npz(path, params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert jnp.result_type(a) == b.dtype
        np.testing.assert_array_equal(np.asarray(a).astype(b.dtype), b)
    assert load_npz(path)["file"] == 2**24 + 1
    for name, (like, message) in {
        "file": (jnp.zeros(1), "file is int32, not float32"),
        "allow_pickle": (jnp.zeros(2, jnp.int32), "allow_pickle is float64, not int32"),
        "flag": (jnp.ones((), jnp.int32), "flag is bool, not int32"),
        "small": ([jnp.zeros(2, jnp.uint4), params["small"][1]], "small/0 is int8, not uint4"),
    }.items():
        with pytest.raises(ValueError, match=message):
            load_npz(path, {**params, name: like})
    with pytest.raises(ValueError, match="file holds 16777217, too large for int16"):
        load_npz(path, {**params, "file": jnp.zeros(1, jnp.int16)})
    export_npz(path, {"w": np.array([2.0**200, 0.5])})
    with pytest.raises(ValueError, match=r"w holds 1\.6.*e\+60, too large for float32"):
        load_npz(path, {"w": jnp.zeros(2)})
    for leaf in ("text", 2**70, jax.random.key(0)):
        with pytest.raises(TypeError, match="a/b must be an array of numbers"):
            export_npz(path, {"a": {"b": leaf}})
    export_npz(path, {"a": 1.0, "a/b": 2.0})
    with pytest.raises(ValueError, match="a/b lies below another array: give `like`"):
        load_npz(path)


def test_bad_input(tmp_path, unchecked):
    path = tmp_path / "params.npz"
    export_npz(path, PARAMS)
    with pytest.raises(ValueError, match=r"lacks \['other'\] and has \['dense/bias', "):
        load_npz(path, like={"other": jnp.ones(3)})
    wider = {**PARAMS, "dense": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"dense/kernel has shape \(2, 3\), not \(2, 4\)"):
        load_npz(path, like=wider)
    with pytest.raises(ValueError, match="two parameters would be written as 'a/b'"):
        export_npz(path, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"not an \.npz of parameters, or is damaged"):
        load_npz(path)
    np.savez(path, evil=np.array([object()]))  # would need pickle
    with pytest.raises(ValueError, match=r"not an \.npz of parameters"):
        load_npz(path)
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "none.npz")
