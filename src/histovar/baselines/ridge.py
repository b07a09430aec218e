"""The honest floor: ridge regression with a cross-validated penalty."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

PENALTIES = np.logspace(1, 6, 11)


def ridge(
    features: NDArray[np.floating],
    expression: NDArray[np.floating],
    query: NDArray[np.floating],
    sections: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Predict expression by ridge regression on standardised features.

    Parameters
    ----------
    features
        (n_spots, n_features) of the training spots.
    expression
        (n_spots, n_genes).
    query
        (n_query, n_features).
    sections
        (n_spots,) section of each spot; the penalty is chosen by leaving sections out, or by five folds of spots where
        there is but one.

    Returns
    -------
    ndarray
        (n_query, n_genes).
    """
    n_sections = 1 if sections is None else len(np.unique(sections))
    folds = GroupKFold(min(n_sections, 5)) if n_sections > 1 else KFold(5, shuffle=True, random_state=0)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()),
        {"ridge__alpha": PENALTIES},
        scoring="neg_mean_squared_error",
        cv=folds,
    )
    search.fit(features, expression, groups=sections)
    predicted: NDArray[np.float64] = search.predict(query)
    return predicted
