"""Images that a data set holds twice: inside a split, or in its training and its test images."""

import hashlib
from collections.abc import Sequence
from typing import Any

_FEW = 0.01  # real sets hold some copies: so large a share of a split is not worth a note


def hash_content(content: Any) -> bytes:
    """A short name of an image's content: equal for copies.

    Args:
      content: the bytes of an encoded image, or a contiguous array.

    >>> from jaxdefense.data import copies
    >>> copies.hash_content(b"image") == copies.hash_content(b"image")
    True
    """
    return hashlib.blake2b(content, digest_size=16).digest()


def describe_copies(train: Sequence[bytes], test: Sequence[bytes] = ()) -> list[str]:
    """Notes on the images that a set holds more than once.

    Test images that were trained on are always counted; copies inside a split where they are more
    than one per cent of it.

    Args:
      train: `hash_content` of the training images.
      test: of the test images.

    >>> from jaxdefense.data import copies
    >>> copies.describe_copies([b"a", b"b", b"b"], [b"b", b"c"])
    ['1 of 2 test images are also training images', '1 of 3 training images are copies of others']
    """
    notes = []
    known = set(train)
    if shared := sum(digest in known for digest in test):
        notes.append(f"{shared} of {len(test)} test images are also training images")
    for name, digests in (("training", train), ("test", test)):
        surplus = len(digests) - len(set(digests))
        if surplus > _FEW * len(digests):
            notes.append(f"{surplus} of {len(digests)} {name} images are copies of others")
    return notes
