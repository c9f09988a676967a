"""Shuffling and random bits as pure functions of (seed, index): no state, no array of the data's size."""

import math

import numpy as np

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15


def mix(x: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit integers: a bijection whose output bits each depend on every input bit.

    Args:
        x: uint64 `[...]`, at least one dimension.

    Returns:
        uint64 `[...]`.

    The finalizer of SplitMix64 (Steele, Lea and Flood 2014, section 4).
    """
    x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> 31)


def key_of(*numbers: int | np.ndarray) -> np.ndarray:
    """Folds integers, or arrays of them that broadcast, into 64-bit keys.

    Args:
        *numbers: what the key depends on, in this order: seed, epoch, index, ...

    Returns:
        uint64, with at least one dimension.

    >>> bool(key_of(0, 1)[0] == key_of(1, 0)[0])
    False
    """
    key = np.zeros(1, np.uint64)
    for number in numbers:
        if isinstance(number, int):
            number = np.array([number % 2**64], np.uint64)
        key = mix((key ^ number.astype(np.uint64)) + np.uint64(_GOLDEN))
    return key


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of `range(size)` sends each index.

    A Feistel network over pairs of digits in base ceil(sqrt(size)) permutes a range at most slightly larger
    than `size`; what falls outside is sent through again until it lands inside (cycle walking; Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        index: integers `[n]` in `[0, size)`.
        size: how many there are to permute, at least 1 and below 2**62.
        key: uint64 `[n]` or `[1]`; equal keys are the same permutation.

    Returns:
        int64 `[n]`, distinct for distinct indices with the same key.

    >>> sorted(permute(np.arange(5), 5, key_of(7)).tolist())
    [0, 1, 2, 3, 4]
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    out = _feistel(index.astype(np.uint64), side, key)
    outside = out >= size
    while outside.any():
        again = np.flatnonzero(outside)
        out[again] = _feistel(out[again], side, key if key.size == 1 else key[again])
        outside[again] = out[again] >= size
    return out.astype(np.int64)


def _feistel(x: np.ndarray, side: np.uint64, key: np.ndarray) -> np.ndarray:
    high, low = np.divmod(x, side)
    for turn in range(1, _ROUNDS + 1):
        turned = mix(key + np.uint64(turn * _GOLDEN % 2**64) + low)
        high, low = low, (high + turned % side) % side
    return high * side + low
