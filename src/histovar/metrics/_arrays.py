"""Annotations of the arrays that metrics take; axes of the same name must have the same length."""

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
# The same genes; spots may differ from those of other arguments.
OtherSpots = Annotated[NDArray[Any], Shape(("other spots", "genes"))]
# One value for each spot and gene, or several draws.
Values = Annotated[NDArray[Any], Shape(("spots", "genes", "samples"), optional=True)]
Draws = Annotated[NDArray[Any], Shape(("spots", "genes", "samples"))]
Quantiles = Annotated[NDArray[Any], Shape(("spots", "genes", "levels"))]
Levels = Annotated[NDArray[Any], Shape(("levels",)), AfterValidator(_levels)]
