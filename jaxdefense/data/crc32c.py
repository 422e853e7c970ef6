"""CRC-32C, which TFRecord files carry, of many byte strings at once.

A CRC is linear over bits: the strings are cut into blocks of equal length, the remainders of all
blocks are computed together, and those of a string are joined from its first block to its last.
"""

import functools
from collections.abc import Sequence

import numpy as np

_BLOCK = 512  # bytes
_AT_ONCE = 64 << 20  # bytes, padding included
_SHIFTS = np.array([[0], [16]], np.uint32)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """What two bytes do to a state of zeros (65536,), and `_BLOCK` zero bytes to each half of a
    state (2, 65536)."""
    table: np.ndarray = np.arange(65536, dtype=np.uint32)
    for _ in range(16):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    shift = np.arange(65536, dtype=np.uint32) << _SHIFTS
    for _ in range(_BLOCK // 2):
        shift = table[shift & 0xFFFF] ^ (shift >> 16)
    return table, shift


def masked(contents: Sequence[bytes]) -> np.ndarray:
    """TFRecord's checksums: CRC-32C, rotated by 15 bits and shifted.

    Args:
      contents: byte strings of at least four bytes.

    Returns:
      (n,) uint32.

    >>> from jaxdefense.data import crc32c
    >>> [hex(value) for value in crc32c.masked([b"123456789"]).tolist()]
    ['0xc78ab0e5']
    """
    table, shift = _tables()
    blocks = max(map(len, contents), default=0) // _BLOCK + 1
    if len(contents) > 1 and len(contents) * blocks * _BLOCK > _AT_ONCE:  # one may be long
        half = len(contents) // 2
        return np.concatenate([masked(contents[:half]), masked(contents[half:])])
    # A state of ones before a string is the string with its first four bytes inverted, and zeros
    # before it change a state of zeros in nothing.
    padded = np.zeros((len(contents), blocks * _BLOCK), np.uint8)
    for row, content in zip(padded, contents):
        row[len(row) - len(content) :] = np.frombuffer(content, np.uint8)
        row[len(row) - len(content) :][:4] ^= 0xFF
    # (pairs of bytes in a block, blocks of a string, strings)
    pairs = np.ascontiguousarray(padded.view("<u2").reshape(-1, blocks, _BLOCK // 2).T)
    remainders = np.zeros(pairs.shape[1:], np.uint32)
    for pair in pairs:
        remainders = table.take((remainders ^ pair) & 0xFFFF) ^ (remainders >> 16)
    states = np.zeros(len(contents), np.uint32)
    for remainder in remainders:
        low, high = (states >> _SHIFTS) & 0xFFFF
        states = shift[0].take(low) ^ shift[1].take(high) ^ remainder
    crc = ~states
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
