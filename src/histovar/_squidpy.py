"""Import squidpy without its import warnings and without changing torch's number of threads."""

import warnings

from ._collection import no_garbage_collection
from ._torch_state import keep_threads

with warnings.catch_warnings(), keep_threads(), no_garbage_collection():
    warnings.simplefilter("ignore", SyntaxWarning)  # raised in docrep
    import squidpy as sq

__all__ = ["sq"]
