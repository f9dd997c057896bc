"""What a language model's bits per byte stand beside: compressors and Kneser-Ney, given the same
text to learn from."""

import gzip
import lzma
import math
from collections import Counter
from collections.abc import Callable

# As good as xz gets on plain text: four bits of the last byte as context, no alignment.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]


def baselines(train: bytes, test: bytes, order: int = 8) -> dict[str, float]:
    """Bits per byte of the test part: gzip and xz after the training part, Kneser-Ney of it."""
    return {
        "bits_per_byte_gzip": _compressed(lambda x: gzip.compress(x, 9), train, test),
        "bits_per_byte_xz": _compressed(
            lambda x: lzma.compress(x, lzma.FORMAT_RAW, filters=XZ), train, test
        ),
        "bits_per_byte_kneser_ney": kneser_ney(train, test, order),
    }


def _compressed(compress: Callable[[bytes], bytes], train: bytes, test: bytes) -> float:
    return 8 * (len(compress(train + test)) - len(compress(train))) / len(test)


def kneser_ney(train: bytes, test: bytes, order: int = 8) -> float:
    """Bits per byte under interpolated Kneser-Ney of bytes, which learns from the test part too.

    p(w | h) = max(c(hw) - D, 0) / c(h) + D N(h) / c(h) p(w | h'), h' the context without its first
    byte, N(h) how many bytes follow it, D = n1 / (n1 + 2 n2) of each order; c counts occurrences in
    the longest n-grams, in shorter ones how many bytes precede (Ney, Essen, Kneser 1994). Below the
    first order all 256 bytes are as likely. A compressor learns from what it has read of the test
    part as well, and so does this.
    """
    grams = [Counter(train[i : i + order] for i in range(len(train) - order + 1))]
    for _ in range(order - 1):
        grams.append(Counter(gram[1:] for gram in grams[-1]))
    tables = []
    for counts in reversed(grams):
        of_counts = Counter(counts.values())
        once, twice = of_counts[1], of_counts[2]
        discount = once / (once + 2 * twice) if once else 0.5
        totals: Counter[bytes] = Counter()
        kinds: Counter[bytes] = Counter()
        for gram, count in counts.items():
            totals[gram[:-1]] += count
            kinds[gram[:-1]] += 1
        tables.append((counts, totals, kinds, discount))
    nats, text = 0.0, train[-order:] + test
    for end in range(len(text) - len(test), len(text)):
        p = 1 / 256
        for n, (counts, totals, kinds, discount) in enumerate(tables):
            context = text[end - n : end]
            total = totals[context]
            if not total:
                break
            share = max(counts[text[end - n : end + 1]] - discount, 0) / total
            p = share + discount * kinds[context] / total * p
        nats -= math.log(p)
        for n in reversed(range(order)):
            counts, totals, kinds, _ = tables[n]
            gram = text[end - n : end + 1]
            counts[gram] += 1
            totals[gram[:-1]] += 1
            if counts[gram] > 1:  # shorter ones count the bytes before them, this one once
                break
            kinds[gram[:-1]] += 1
    return nats / (len(test) * math.log(2))
