"""Whether sections differ in how they were made or in what they are: chosen on training sections held out in turn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from torch import Tensor

from histovar.model import Histology
from histovar.model.condition import ConditionProcessor, Moments

PENALTIES = np.logspace(1, 6, 11)
# More spots would not change the choice.
MOST_SPOTS = 5000


def fit_condition(
    condition: ConditionProcessor,
    histology: Histology,
    sections: Tensor,
    moments: Mapping[int, Moments],
    targets: Tensor,
    random_state: int,
) -> None:
    """Fit the condition; where its configuration leaves it open, choose between own and training's statistics.

    Standardising a section by its own mean and standard deviation takes stain and scanner out, and with them what sets
    the section's tissue apart. Which matters more differs between data sets. Ridge regression with a tuned penalty on
    the condition's features, each training section (or one of five groups of them) predicted from the others, decides:
    sections are standardised by their own statistics, unless those of training predict every one of them better. With a
    single section there is nothing to decide by.

    Parameters
    ----------
    condition
        Fitted in place.
    histology
        Inputs of training spots.
    sections
        (n_spots,) number of each spot's section.
    moments
        Those of each section.
    targets
        (n_spots, n_targets) what the features are to predict.
    random_state
        Seed of the choice of 5,000 spots, where there are more.
    """
    config = condition.config
    n_sections = len(moments)
    if config.condition != "pca" or config.standardize != "auto" or n_sections < 2:
        condition.fit(histology, sections, config.standardize != "training", moments)
        return
    rows = np.random.default_rng(random_state).permutation(len(sections))[:MOST_SPOTS]
    scores = []
    for own in (False, True):
        condition.fit(histology, sections, own, moments)
        features = condition.features(condition.align(histology, sections, moments))
        scores.append(_scores(*(t[rows].numpy() for t in (features, targets, sections))))
    if (scores[0] > scores[1]).all():
        condition.fit(histology, sections, False, moments)


def _scores(
    features: NDArray[np.float32], targets: NDArray[np.float32], sections: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Negative mean squared error on each held-out section, at the penalty that is best on average."""
    folds = GroupKFold(min(5, len(np.unique(sections))))
    search = GridSearchCV(Ridge(), {"alpha": PENALTIES}, scoring="neg_mean_squared_error", cv=folds, refit=False)
    search.fit(features, targets, groups=sections)
    results = search.cv_results_
    return np.array([results[f"split{i}_test_score"][search.best_index_] for i in range(folds.get_n_splits())])
