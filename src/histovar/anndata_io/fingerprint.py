"""Fingerprints of arrays, by which a derived slot is known to be out of date."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from .matrix import canonical

ROWS_AT_ONCE = 8192


def of_rows(*columns: NDArray[Any]) -> NDArray[np.uint64]:
    """64-bit fingerprint of each row, which does not change when other rows are dropped or reordered.

    Parameters
    ----------
    *columns
        Arrays of (n_rows,) or (n_rows, width), numbers or text. Numbers are compared as 32-bit floats.

    Returns
    -------
    ndarray
        (n_rows, 1), a shape that fits ``obsm``. Multiply-add hashing of 32-bit words with random odd multipliers: two
        different rows get the same fingerprint only by chance, one time in billions.
    """
    n_rows = len(columns[0])
    total = np.zeros(n_rows, np.uint64)
    rng = np.random.default_rng(0)
    for column in columns:
        values = np.asarray(column)
        if values.dtype.kind not in "fiub":
            labels, codes = np.unique(values.astype(str), return_inverse=True)
            hashes = [
                int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little") for label in labels
            ]
            total += np.array(hashes, np.uint64)[codes]
            continue
        values = values.reshape(n_rows, -1)
        odd = rng.integers(0, 2**63, values.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        for start in range(0, n_rows, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            words = np.ascontiguousarray(values[rows], np.float32).view(np.uint32).astype(np.uint64)
            # Squares make the upper half of the sum, too, depend on every bit of a word.
            total[rows] += ((words + odd) * (words + (odd >> np.uint64(32)))).sum(1, dtype=np.uint64)
    return total[:, None]


def of_matrix(matrix: Any) -> str:
    """Fingerprint of a dense or sparse matrix in memory; equal values give the same one, however they are stored."""
    rows = canonical(matrix)
    digest = hashlib.blake2b(str(rows.shape).encode(), digest_size=16)
    if sparse.issparse(rows):
        for values, dtype in ((rows.indptr, np.int64), (rows.indices, np.int64), (rows.data, np.float32)):
            digest.update(np.ascontiguousarray(values, dtype).view(np.uint8).data)
    else:
        digest.update(np.ascontiguousarray(rows, np.float32).view(np.uint8).data)
    return digest.hexdigest()
