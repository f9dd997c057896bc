"""Text as tokens: by name or by path, in bytes or by byte-level BPE, windows and packed documents.

Both parts are bytes; the tokens are learnt from the part to train on alone.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from genjax import checks

__all__ = ["Text", "Tokeniser", "pack", "scored_windows", "text", "tokeniser", "windows"]

HELD_OUT = 0.1
SEPARATOR = b"\0"
TEXTS = ("pydoc",)


class Text(NamedTuple):
    """A text in two parts, bytes in UTF-8, with a NUL after each document."""

    name: str
    train: bytes
    test: bytes

    @property
    def sha256(self) -> str:
        """Of both parts: which text it is."""
        return hashlib.sha256(self.train + b"\0\0" + self.test).hexdigest()


class Tokeniser(NamedTuple):
    """Between text and tokens, 0 .. vocabulary - 1. pieces: the bytes of each token. model: the
    BPE of the `tokenizers` library as JSON, empty where a token is a byte."""

    pieces: tuple[bytes, ...]
    model: str = ""

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return len(self.pieces)

    def encode(self, data: bytes | str) -> np.ndarray:
        """Tokens int32 [length] of a text; raises ValueError where it is not UTF-8."""
        raw = data.encode() if isinstance(data, str) else data
        if not self.model:
            return np.frombuffer(raw, np.uint8).astype(np.int32)
        try:
            readable = raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"text must be UTF-8 to be encoded, got {error}") from error
        found = _tokenizers().Tokenizer.from_str(self.model).encode(readable)
        return np.asarray(found.ids, np.int32)

    def decode(self, tokens: Any) -> bytes:
        """The bytes of tokens [length]: exactly what was encoded."""
        tokens = np.asarray(tokens)
        checks.rank("tokens", tokens, 1)
        checks.between("tokens", tokens, 0, self.vocabulary - 1)
        return b"".join(self.pieces[i] for i in tokens)

    def lengths(self, tokens: Any) -> np.ndarray:
        """Number of bytes of each token."""
        return np.asarray([len(piece) for piece in self.pieces])[np.asarray(tokens)]


def text(name: str | os.PathLike) -> Text:
    """A text by name or by path, split into a part to train on and one to test on.

    "pydoc" is the running Python's own documentation: the topics of pydoc_data, sorted, without
    paragraphs that stood in an earlier topic (a fifth of the text is repeated and would leak into
    the test part), whole topics held out by a fixed permutation. A path is a file, whose last tenth
    is held out from the next line on, or a folder of .txt files, of which every tenth, by a fixed
    permutation of their sorted names, is held out. Raises ValueError for what is neither, for an
    empty text, and for one that is not UTF-8.

    >>> bool(len(text("pydoc").train) > 100_000)
    True
    """
    if str(name) == "pydoc":
        return _documents("pydoc", list(_pydoc()))
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if len(files) < 2:
            raise ValueError(f"{path} must hold at least two .txt files, got {len(files)}")
        return _documents(path.name, [_read(file) for file in files])
    if not path.is_file():
        raise ValueError(f"text must be one of {list(TEXTS)}, a file or a folder, got {name!r}")
    raw = _read(path)
    start = int((1 - HELD_OUT) * len(raw))
    cut = raw.find(b"\n", start, len(raw) - 1) + 1 or start  # after a line that is not the last
    while cut < len(raw) and raw[cut] & 0xC0 == 0x80:  # not inside a character
        cut += 1
    if not 0 < cut < len(raw):
        raise ValueError(f"{path} is too short to be split, got {len(raw)} bytes")
    return Text(path.name, raw[:cut], raw[cut:])


def _pydoc() -> Any:
    from pydoc_data import topics

    seen: set[str] = set()
    for name in sorted(topics.topics):
        fresh = []
        for paragraph in topics.topics[name].split("\n\n"):
            if paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                fresh.append(paragraph)
        if fresh:
            yield "\n\n".join(fresh).encode()


def _documents(name: str, documents: Sequence[bytes]) -> Text:
    rank = np.random.default_rng(0).permutation(len(documents))
    held = rank < max(1, round(HELD_OUT * len(documents)))
    parts = [
        b"".join(d + SEPARATOR for d, out in zip(documents, held, strict=True) if out == test)
        for test in (False, True)
    ]
    return Text(name, *parts)


def _read(path: Path) -> bytes:
    raw = path.read_bytes()
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, got {error}") from error
    if not raw.strip():
        raise ValueError(f"{path} must hold text, got {len(raw)} bytes")
    return raw


def tokeniser(train: bytes, vocabulary: int = 256) -> Tokeniser:
    """Bytes as tokens (vocabulary 256), or a byte-level BPE of that many tokens trained on `train`.

    The BPE is that of the `tokenizers` library (extra "text"; Sennrich et al. 2016, on bytes as in
    GPT-2): every byte is a token, so that any text goes there and back exactly. Raises ValueError
    for a vocabulary below 256, or larger than the text has pairs for.

    >>> codes = tokeniser(b"").encode(b"hi")
    >>> codes
    array([104, 105], dtype=int32)
    """
    checks.integer("vocabulary", vocabulary, 256)
    if vocabulary == 256:
        return Tokeniser(tuple(bytes([i]) for i in range(256)))
    library = _tokenizers()
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator([train.decode()], trainer)
    stored = model.to_str()
    found = Tokeniser(_pieces(stored), stored)
    if found.vocabulary != vocabulary:
        raise ValueError(
            f"vocabulary must be at most what the text has pairs for, {found.vocabulary}, "
            f"got {vocabulary}"
        )
    return found


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("BPE needs tokenizers: pip install 'genjax-models[text]'") from error
    return tokenizers


def _pieces(model: str) -> tuple[bytes, ...]:
    """The bytes of each token of a byte-level BPE, which writes bytes as printable characters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in plain]
    byte_of = {chr(i): i for i in plain} | {chr(256 + n): i for n, i in enumerate(others)}
    vocabulary = json.loads(model)["model"]["vocab"]
    return tuple(bytes(byte_of[c] for c in piece) for piece, _ in sorted(
        vocabulary.items(), key=lambda item: item[1]
    ))  # fmt: skip


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """All windows of consecutive tokens, int32 [num - length + 1, length], without a copy.

    As data of `batch_at` they are batches as a function of (seed, step), each epoch every window
    once. Raises ValueError where the text is shorter than a window.

    >>> windows(np.arange(5), 3)
    array([[0, 1, 2],
           [1, 2, 3],
           [2, 3, 4]], dtype=int32)
    """
    _check_length(tokens, length)
    return np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, np.int32), length)


def scored_windows(
    tokens: np.ndarray, length: int, stride: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Windows int32 [n, length] of a text, and where bool [n, length]: every token kept once.

    Windows begin every `stride` tokens (default: half of `length`), the last one so that it ends
    with the text; kept are those that no earlier window had, which so have length - stride tokens
    before them at least, but for the first window's.

    >>> tokens, scored = scored_windows(np.arange(6), 4)
    >>> int(scored.sum())
    6
    """
    _check_length(tokens, length)
    stride = max(length // 2, 1) if stride is None else stride
    checks.integer("stride", stride, 1)
    if stride > length:
        raise ValueError(f"stride must be at most length = {length}, got {stride}")
    last = len(tokens) - length
    starts = np.append(np.arange(0, last, stride), last)
    seen = np.concatenate([[0], starts[:-1] + length])
    places = starts[:, None] + np.arange(length)[None]
    return np.asarray(tokens, np.int32)[places], places >= seen[:, None]


def pack(
    documents: Sequence[np.ndarray], length: int, *, pad: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Several documents to a row: tokens int32 and segments int32, both [n, length].

    Each goes into the first row with room for it, longer ones in pieces of `length`; segments
    counts a row's documents from 0 and is -1 where `pad` fills it: `segments >= 0` is the mask of
    a loss, `segments` the argument of a network that keeps documents apart. Raises ValueError for
    no documents or an empty one.

    >>> tokens, document = pack([np.array([1, 2]), np.array([3])], 4)
    >>> tokens
    array([[1, 2, 3, 0]], dtype=int32)
    """
    checks.integer("length", length, 1)
    if not len(documents) or not all(map(len, documents)):
        raise ValueError(f"documents must be at least one, none empty, got {len(documents)}")
    pieces = [d[i : i + length] for d in documents for i in range(0, len(d), length)]
    rows: list[list[np.ndarray]] = []
    room: list[int] = []
    for piece in pieces:
        at = next((i for i, left in enumerate(room) if left >= len(piece)), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(length)
        rows[at].append(piece)
        room[at] -= len(piece)
    tokens = np.full((len(rows), length), pad, np.int32)
    segments = np.full((len(rows), length), -1, np.int32)
    for i, row in enumerate(rows):
        filled = np.concatenate(row)
        tokens[i, : len(filled)] = filled
        segments[i, : len(filled)] = np.repeat(np.arange(len(row)), [len(piece) for piece in row])
    return tokens, segments


def _check_length(tokens: np.ndarray, length: int) -> None:
    checks.rank("tokens", tokens, 1)
    checks.integer("length", length, 1)
    if len(tokens) < length:
        raise ValueError(f"tokens must be at least a window of {length}, got {len(tokens)}")
