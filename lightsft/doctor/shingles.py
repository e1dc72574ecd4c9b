"""Texts as sets of hashed word triples, and the estimates of their overlap, a block of texts at a time.

A triple is a substring of the normalised text, and the hash of a substring comes from a running sum (Karp and Rabin
1987): with P[i] = sum_{j<i} c_j b^j mod 2^64,

    hash(s, e) = mix((P[e] - P[s]) b^-s),

so a block of texts costs a handful of array operations, whatever its texts are. Characters of scripts that are written
without spaces count as words.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

WORDS = 3  # of a shingle
FEWEST_WORDS = 6  # of a text that is compared: in shorter ones a triple weighs too much
LONGEST_BYTES = 100_000  # of a text; what is beyond is not compared
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse mod 2^64
_PUNCTUATION = bytes.maketrans(
    (string.punctuation + string.ascii_uppercase).encode(), (b" " * 32 + string.ascii_lowercase.encode())
)
_MARKS = (  # vowel signs and accents, which \w leaves out: Latin, Hebrew, Arabic, the scripts of India to Cambodia
    "\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff\u0e00-\u0fff\u1000-\u109f"
    "\u1780-\u17d3"
)
_NO_WORD = re.compile(rf"[^\w\s{_MARKS}]+")
_SPACELESS = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")


def words_of(text: str, data: bytes) -> list[bytes]:
    """The words of a text (`data` is its UTF-8), without case and punctuation."""
    if len(data) != len(text):
        text = _SPACELESS.sub(r" \1 ", _NO_WORD.sub(" ", text[:LONGEST_BYTES].casefold()))
        data = text.encode("utf-8", "surrogatepass")
    return data[:LONGEST_BYTES].translate(_PUNCTUATION).split()


def shingle_sets(texts: Sequence[bytes]) -> tuple[Array, Array]:
    """Sorted distinct 32-bit shingle hashes of each text, one after the other, and offsets (texts + 1).

    A text is at least WORDS words with a single space between two.
    """
    block = np.frombuffer(b" ".join(texts), dtype=np.uint8)
    spaces = np.flatnonzero(block == 32)
    starts = np.concatenate([[0], spaces + 1])
    ends = np.concatenate([spaces, [len(block)]])
    counts = np.array([text.count(b" ") + 1 for text in texts])
    owner = np.repeat(np.arange(len(texts), dtype=np.uint64), counts)
    first = np.flatnonzero(owner[: 1 - WORDS] == owner[WORDS - 1 :])  # words with two more of the same text behind
    powers, inverses = _powers(1 << len(block).bit_length())
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(block * powers[: len(block)], dtype=np.uint64)])
    hashes = (sums[ends[first + WORDS - 1]] - sums[starts[first]]) * inverses[starts[first]]
    keys = (owner[first] << np.uint64(32)) | (mix(hashes) >> np.uint64(32))
    keys.sort()  # five times as fast as np.unique, which hashes first
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]
    offsets = np.searchsorted(keys, np.arange(len(texts) + 1, dtype=np.uint64) << np.uint64(32))
    return keys.astype(np.uint32), offsets


def mix(values: Array) -> Array:
    """64 bits to 64 bits, each depending on all (the end of MurmurHash3)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    mixed: Array = values ^ (values >> np.uint64(33))
    return mixed


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[Array, Array]:
    """b^0 ... b^(count-1) mod 2^64, and of its inverse."""
    both = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        powers = np.full(count, base, dtype=np.uint64)
        powers[0] = 1
        both.append(np.cumprod(powers, dtype=np.uint64))
    return both[0], both[1]


def band_hashes(values: Array, offsets: Array, band: int, rows: int) -> Array:
    """(texts,) one hash of `rows` min-hashes (Broder 1997): equal for two sets with probability Jaccard^rows."""
    random = np.random.default_rng(band)
    result = np.zeros(len(offsets) - 1, dtype=np.uint64)
    chunk = 1 << 20
    edges = np.unique(np.concatenate([np.searchsorted(offsets, np.arange(0, int(offsets[-1]), chunk)), [len(result)]]))
    factors = random.integers(0, 1 << 63, size=(rows, 2), dtype=np.uint64)
    for start, end in pairwise(edges.tolist()):
        part = values[offsets[start] : offsets[end]].astype(np.uint64)
        places = (offsets[start:end] - offsets[start]).astype(np.intp)
        for factor, summand in factors:
            permuted = part * (factor << np.uint64(1) | np.uint64(1)) + summand
            permuted >>= np.uint64(32)
            result[start:end] = mix(result[start:end] ^ np.minimum.reduceat(permuted, places))
    return result


def jaccards(values: Array, offsets: Array, one: Array, other: Array) -> Array:
    """(pairs,) |A and B| / |A or B| of the sets numbered `one` and `other`, exact up to collisions of 32-bit hashes."""
    result = np.zeros(len(one))
    sizes = np.diff(offsets)
    elements = np.cumsum(sizes[one] + sizes[other])
    edges = np.unique(
        np.concatenate([[0], np.searchsorted(elements, np.arange(1 << 20, int(elements[-1]), 1 << 20)), [len(one)]])
    )
    for start, end in pairwise(edges.tolist()):
        pair = slice(start, end)
        keys = np.concatenate([_elements(values, offsets, sets[pair]) for sets in (one, other)])
        keys.sort()
        common = np.bincount(
            (keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)).astype(np.intp), minlength=pair.stop - pair.start
        )
        result[pair] = common / (sizes[one[pair]] + sizes[other[pair]] - common)
    return result


def _elements(values: Array, offsets: Array, sets: Array) -> Array:
    """The elements of each set, with its place in `sets` in the upper half."""
    sizes = offsets[sets + 1] - offsets[sets]
    ends = np.cumsum(sizes)
    index = np.arange(int(ends[-1])) - np.repeat(ends - sizes, sizes) + np.repeat(offsets[sets], sizes)
    place = np.repeat(np.arange(len(sets), dtype=np.uint64), sizes)
    keys: Array = (place << np.uint64(32)) | values[index].astype(np.uint64)
    return keys
