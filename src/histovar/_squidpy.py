"""squidpy, imported without the warnings that its import gives."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # of docrep
    import squidpy as sq

__all__ = ["sq"]
