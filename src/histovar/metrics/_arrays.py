"""Arrays that metrics take, as annotations of their arguments: axes of one name are as long in all of them."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from histovar._arguments import Shape, refuse_value


def _levels(values: NDArray[Any]) -> NDArray[Any]:
    if not len(values) or not ((values >= 0) & (values <= 1)).all() or (np.diff(values) <= 0).any():
        refuse_value("probabilities that increase, in an array of shape (levels,)")
    return values


Spots = Annotated[NDArray[Any], Shape(("spots",))]
Matrix = Annotated[NDArray[Any], Shape(("spots", "genes"))]
# Of the same genes, in spots that need not be those of other arguments.
OtherSpots = Annotated[NDArray[Any], Shape(("other spots", "genes"))]
# Of each spot and gene one value, or several draws.
Values = Annotated[NDArray[Any], Shape(("spots", "genes", "samples"), optional=True)]
Draws = Annotated[NDArray[Any], Shape(("spots", "genes", "samples"))]
Quantiles = Annotated[NDArray[Any], Shape(("spots", "genes", "levels"))]
Levels = Annotated[NDArray[Any], Shape(("levels",)), AfterValidator(_levels)]
