"""squidpy, imported without the warnings that its import gives and without a change of threads."""

import warnings

from ._collection import no_garbage_collection
from ._torch_state import keep_threads

with warnings.catch_warnings(), keep_threads(), no_garbage_collection():
    warnings.simplefilter("ignore", SyntaxWarning)  # of docrep
    import squidpy as sq

__all__ = ["sq"]
