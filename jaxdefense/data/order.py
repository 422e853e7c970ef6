"""Orders that depend on a seed alone: the shuffle of each epoch, and stratified held-out rows.

They rest on the raw output of Philox, which numpy keeps fixed, and not on `Generator`, whose
methods may change between releases: a seed means the same order on every machine.
"""

import numpy as np


def permutation(n: int, seed: int, stream: int = 0) -> np.ndarray:
    """A permutation of 0..n-1, a function of (n, seed, stream).

    Args:
      n: the number of rows.
      seed: at least 0, below 2**64.
      stream: tells apart the permutations of one seed, e.g. the epoch.

    Returns:
      (n,) int32.

    Raises:
      ValueError: `seed` or `stream` is outside [0, 2**64).

    >>> from jaxdefense.data import order
    >>> sorted(order.permutation(5, seed=0).tolist())
    [0, 1, 2, 3, 4]
    """
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 2**64:
            raise ValueError(f"need 0 <= {name} < 2**64, got {value}")
    draws = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(n)
    return np.argsort(draws, kind="stable").astype(np.int32)


def stratified(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """`n` rows in which every class has its share, up to one row.

    Args:
      labels: (N,) integers.
      n: how many rows to choose, 0 <= n <= N.
      seed: see `permutation`.

    Returns:
      (n,) int32, ascending.

    Raises:
      ValueError: `n` is negative or above the number of rows.

    >>> import numpy as np
    >>> from jaxdefense.data import order
    >>> labels = np.array([0, 1] * 50)
    >>> rows = order.stratified(labels, 10, seed=0)
    >>> np.bincount(labels[rows]).tolist()
    [5, 5]
    """
    if not 0 <= n <= len(labels):
        raise ValueError(f"cannot choose {n} of {len(labels)} rows")
    if n == 0:
        return np.zeros(0, np.int32)
    shuffled = permutation(len(labels), seed)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # Evenly spaced picks through the rows sorted by class give each class its share.
    return np.sort(by_class[np.arange(n, dtype=np.int64) * len(labels) // n])
