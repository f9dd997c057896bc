"""Batches: a pure function of (seed, step), without replacement, sharded by process."""

import itertools

import numpy as np
import pytest

from genjax.data import batch_at, check_arrays, in_order, stream

ARRAYS = {"x": np.arange(100, dtype=np.float32)[:, None], "label": np.arange(100) % 10}


def seen(steps, **options):
    return [batch_at(ARRAYS, step=s, **options)["x"][:, 0].astype(int) for s in steps]


def test_epoch_is_without_replacement_and_shuffled():
    epochs = [np.concatenate(seen(range(9 * e, 9 * e + 9), seed=0, batch_size=11)) for e in (0, 1)]
    for epoch in epochs:
        assert len(set(epoch)) == 99
        assert list(epoch) != sorted(epoch)
    assert list(epochs[0]) != list(epochs[1])


def test_is_a_function_of_seed_and_step():
    first = seen([3, 50, 3], seed=7, batch_size=16)
    np.testing.assert_array_equal(first[0], first[2])
    assert list(first[0]) != list(seen([3], seed=8, batch_size=16)[0])
    batch = batch_at(ARRAYS, seed=7, step=3, batch_size=16)
    np.testing.assert_array_equal(batch["label"], batch["x"][:, 0] % 10)


def test_shares_make_up_the_batch():
    for step in (0, 5, 77):
        whole = seen([step], seed=1, batch_size=24)[0]
        shares = [
            seen([step], seed=1, batch_size=24, process_index=i, process_count=4)[0]
            for i in range(4)
        ]
        assert {len(s) for s in shares} == {6}
        np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_every_example_is_met_equally_often():
    met = np.bincount(np.concatenate(seen(range(4000), seed=2, batch_size=30)), minlength=100)
    # 1,333 epochs, each meeting an example with probability 0.9.
    assert abs(met / (4000 / 3) - 0.9).max() < 5 * np.sqrt(0.09 / 1333)


def test_stream_is_batch_at_over_steps():
    steps = itertools.islice(stream(ARRAYS, seed=3, batch_size=32, start_step=5), 20)
    for step, batch in enumerate(steps, start=5):
        expected = batch_at(ARRAYS, seed=3, step=step, batch_size=32)
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name])


class Squares:
    """Records that are read, not held."""

    def __len__(self):
        return 10**9

    def take(self, indices):
        return {"x": indices.astype(np.float64) ** 2}


def test_batches_of_records():
    few = type("Few", (Squares,), {"__len__": lambda self: 1000})()
    batch = batch_at(few, seed=0, step=2, batch_size=8)
    assert batch["x"].shape == (8,)
    streamed = next(stream(few, seed=0, batch_size=8, start_step=2))
    np.testing.assert_array_equal(streamed["x"], batch["x"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 101}, ValueError, "at most the split's 100 examples, got 101"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"step": -1}, ValueError, "step must be at least 0"),
        ({"step": 1.5}, TypeError, "step must be an integer"),
        ({"process_count": 3}, ValueError, "divisible by process_count=3, got 10"),
        ({"process_index": 1}, ValueError, "process_index must be below process_count=1"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        batch_at(ARRAYS, **{"seed": 0, "step": 0, "batch_size": 10} | options)
    if "step" not in options:
        with pytest.raises(error, match=message):
            stream(ARRAYS, **{"seed": 0, "batch_size": 10} | options)


@pytest.mark.usefixtures("unchecked")
def test_bad_arrays():
    broken = np.zeros((10, 2), np.float32)
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"x must be finite, got 1 .* first at index \(3, 1\)"):
        check_arrays({"x": broken})
    with pytest.raises(ValueError, match="x must be finite"):
        batch_at({"x": broken}, seed=0, step=0, batch_size=10)
    with pytest.raises(TypeError, match="x must hold integers, booleans or floats, got dtype <U1"):
        check_arrays({"x": np.array(["a", "b"])})
    with pytest.raises(ValueError, match="x must have rank 4"):
        check_arrays({"x": np.zeros((3, 2))}, ranks={"x": 4})
    with pytest.raises(ValueError, match=r"equal, got x \(3,\), label \(2,\)"):
        batch_at({"x": np.zeros(3), "label": np.zeros(2)}, seed=0, step=0, batch_size=1)
    with pytest.raises(ValueError, match="at least one array"):
        check_arrays({})


def test_in_order_gives_every_example_once_in_its_order():
    """A tail, a batch larger than the split, several processes, records on disk."""
    data = {"x": np.arange(22).reshape(11, 2), "label": np.arange(11)}

    class OnDisk:
        def __len__(self):
            return 11

        def take(self, indices):
            return {name: array[indices] for name, array in data.items()}

    for source in (data, OnDisk()):
        for batch_size, count in ((4, 3), (11, 1), (1, 11), (16, 1)):
            found = list(in_order(source, batch_size=batch_size))
            assert len(found) == count
            assert {batch["x"].shape for batch, _ in found} == {(batch_size, 2)}
            rows = np.concatenate([batch["label"][keep] for batch, keep in found])
            np.testing.assert_array_equal(rows, data["label"])
    shares = [
        list(in_order(data, batch_size=6, process_index=i, process_count=3)) for i in range(3)
    ]
    assert {len(share) for share in shares} == {2}
    rows = [batch["label"][keep] for step in zip(*shares, strict=True) for batch, keep in step]
    np.testing.assert_array_equal(np.concatenate(rows), data["label"])
    with pytest.raises(ValueError, match="divisible by process_count=3, got 4"):
        in_order(data, batch_size=4, process_count=3)
    with pytest.raises(ValueError, match="at least one example"):
        in_order({"x": np.zeros((0, 2))}, batch_size=4)
