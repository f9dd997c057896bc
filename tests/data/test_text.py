"""Texts in two parts, tokens there and back exactly, windows that keep a token once, packing."""

import sys

import numpy as np
import pytest

from genjax.data import batch_at, pack, scored_windows, text, tokeniser, windows

SAMPLE = ("Der Fluß fließt – naïve café, 日本語. " * 40).encode() + bytes(range(128))


@pytest.fixture(scope="module")
def pydoc():
    return text("pydoc")


def test_pydoc_is_split_by_topic_and_repeats_nothing(pydoc):
    from pydoc_data import topics

    again = text("pydoc")
    assert (again.train, again.sha256) == (pydoc.train, pydoc.sha256)
    train, test = ({p.strip() for p in part.decode().split("\n\n")} for part in pydoc[1:])
    assert not (train & test) - {""}
    documents = [d for part in pydoc[1:] for d in part.split(b"\0")[:-1]]
    everything = "".join(topics.topics.values()).encode()
    assert 0.7 * len(everything) < sum(map(len, documents)) < 0.9 * len(everything)
    assert 0.05 < len(pydoc.test) / len(pydoc.train) < 0.2
    if sys.version_info[:2] == (3, 11):
        assert (len(pydoc.train) // 1000, len(pydoc.test) // 1000) == (335, 38)


def test_own_files_and_folders(tmp_path):
    lines = "".join(f"line {i} – é\n" for i in range(100))
    (tmp_path / "book.txt").write_text(lines)
    found = text(tmp_path / "book.txt")
    assert (found.train + found.test).decode() == lines
    assert found.train.endswith(b"\n")
    assert 0.85 < len(found.train) / len(lines.encode()) < 0.95
    (tmp_path / "one.txt").write_text("é" * 100)
    one = text(tmp_path / "one.txt")
    assert (one.train.decode() + one.test.decode()) == "é" * 100
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"document {i}")
    found = text(folder)
    names = [part.decode().split("\0")[:-1] for part in found[1:]]
    assert (len(names[0]), len(names[1])) == (18, 2)
    assert sorted(names[0] + names[1]) == sorted(f"document {i}" for i in range(20))


def test_bytes_and_bpe_go_there_and_back(pydoc):
    single = tokeniser(SAMPLE)
    np.testing.assert_array_equal(single.encode(SAMPLE), list(SAMPLE))
    assert single.decode(single.encode(SAMPLE)) == SAMPLE
    bpe = tokeniser(pydoc.train[:50_000], 400)
    assert bpe == tokeniser(pydoc.train[:50_000], 400)
    assert bpe.vocabulary == 400
    assert sorted(bpe.pieces)[0] == b"\0"
    assert {bytes([i]) for i in range(256)} <= set(bpe.pieces)
    for data in (SAMPLE, pydoc.test):
        tokens = bpe.encode(data)
        assert bpe.decode(tokens) == data
        assert bpe.lengths(tokens).sum() == len(data)
    assert len(bpe.encode(pydoc.test)) < 0.65 * len(pydoc.test)


def test_every_token_is_scored_once_with_what_is_before_it():
    for size, length, stride in ((100, 16, None), (16, 16, 4), (33, 8, 8), (21, 8, 3)):
        tokens = np.arange(size)
        x, where = scored_windows(tokens, length, stride)
        np.testing.assert_array_equal(np.sort(x[where]), tokens)
        np.testing.assert_array_equal(np.diff(x, axis=1), 1)
        step = length // 2 if stride is None else stride
        first = where.argmax(axis=1)
        assert where[0].all()
        assert (first[1:] >= length - step).all()


def test_batches_of_windows_are_a_function_of_seed_and_step():
    data = {"x": windows(np.arange(50), 8)}
    assert data["x"].shape == (43, 8)
    first = batch_at(data, seed=1, step=3, batch_size=4)["x"]
    np.testing.assert_array_equal(first, batch_at(data, seed=1, step=3, batch_size=4)["x"])
    np.testing.assert_array_equal(np.diff(first, axis=1), 1)
    epoch = [batch_at(data, seed=1, step=i, batch_size=43)["x"][:, 0] for i in range(1)]
    np.testing.assert_array_equal(np.sort(epoch[0]), np.arange(43))


def test_packing_keeps_every_document_whole():
    documents = [np.full(n, n) for n in (3, 5, 2, 9, 4, 1)]
    tokens, segments = pack(documents, 8, pad=99)
    assert tokens.shape == segments.shape == (3, 8)
    np.testing.assert_array_equal((tokens == 99), segments < 0)
    pieces = [
        tokens[i][segments[i] == s]
        for i in range(len(tokens))
        for s in range(segments[i].max() + 1)
    ]
    assert all(len(set(piece.tolist())) == 1 for piece in pieces)
    assert sorted(map(len, pieces)) == sorted([3, 5, 2, 8, 1, 4, 1])
    np.testing.assert_array_equal(tokens[0], [3, 3, 3, 5, 5, 5, 5, 5])


def test_bad_input(tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for make, match in (
        (lambda: text("pydocs"), "text must be one of"),
        (lambda: text(tmp_path / "empty.txt"), "must hold text"),
        (lambda: text(tmp_path / "latin.txt"), "must be UTF-8"),
        (lambda: tokeniser(b"abc", 255), "vocabulary must be at least 256, got 255"),
        (lambda: tokeniser(b"abc", 1000), "vocabulary must be at most what the text has pairs for"),
        (lambda: tokeniser(SAMPLE, 300).encode(b"\xff"), "must be UTF-8"),
        (lambda: tokeniser(SAMPLE).decode([256]), r"tokens must lie in \[0, 255\]"),
        (lambda: windows(np.arange(3), 4), "tokens must be at least a window of 4, got 3"),
        (lambda: scored_windows(np.arange(9), 4, 5), "stride must be at most length = 4"),
        (lambda: pack([], 4), "documents must be at least one"),
        (lambda: pack([np.arange(0)], 4), "documents must be at least one"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    (tmp_path / "latin.txt").unlink()
    (tmp_path / "empty.txt").unlink()
    with pytest.raises(ValueError, match=r"at least two \.txt files, got 0"):
        text(tmp_path)


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_text_of_one_line_is_cut_all_the_same(tmp_path, end):
    path = tmp_path / "one.txt"
    path.write_bytes(b"abcdefghij" * 1000 + end)
    found = text(path)
    assert (len(found.train), len(found.test)) == (9000, 1000 + len(end))
