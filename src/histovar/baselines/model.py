"""A fitted baseline, which predicts into AnnData as the model does."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from pydantic import AfterValidator
from sklearn.base import clone
from sklearn.model_selection import GroupKFold, KFold

from histovar._arguments import Key, check_arguments, refuse_value
from histovar._keys import Keys, Prefix
from histovar._torch_state import in_float32
from histovar.anndata_io import expression, gate, slots
from histovar.anndata_io.gate import Data
from histovar.anndata_io.neighbors import Neighborhoods
from histovar.anndata_io.normalization import Normalization
from histovar.anndata_io.prediction import Prediction, prediction_slots, write_prediction

from .linear import HestRidge, TunedRidge, pls
from .mfbp import MFBP
from .mlp import MLP
from .neighbors import kernel_ridge, knn
from .var_st import VARST

logger = logging.getLogger(__name__)

Standardize = Literal["section", "training"]


class Method(NamedTuple):
    """How a baseline is made, whether it draws at random, and what it sees of a spot."""

    make: Callable[[int], Any]
    is_random: bool
    niche: tuple[tuple[int, ...], tuple[int, ...]] | None
    """Neighbourhoods of the first embedding and of each further one; None: the first embedding alone."""


METHODS: dict[str, Method] = {
    "ridge_hest": Method(lambda _: HestRidge(), False, None),
    "ridge": Method(lambda _: TunedRidge(), False, ((8, 24), ())),
    "pls": Method(lambda _: pls(), False, ((8, 24), ())),
    "kernel_ridge": Method(lambda _: kernel_ridge(), False, ((8, 24), ())),
    "knn": Method(lambda _: knn(), False, ((8, 24), ())),
    "mlp": Method(lambda seed: MLP(seed), True, ((8, 24), (8,))),
    "mfbp": Method(lambda seed: MFBP(seed), True, None),
    "var_st": Method(lambda seed: VARST(seed), True, None),
}


def _method(value: str) -> str:
    return value if value in METHODS else refuse_value(f"one of {', '.join(map(repr, METHODS))}")


MethodName = Annotated[str, AfterValidator(_method)]


@dataclass
class Baseline:
    """A baseline and what it was trained on. :func:`histovar.tl.baseline` makes one.

    Parameters
    ----------
    method
        Its name.
    genes, layer, normalization
        What it predicts.
    use_rep, library_key, spatial_key
        What it predicts from.
    standardize
        Whether features are standardised within sections first.
    random_state
        Seed.
    group_key
        Column of ``obs`` with the individual, by which folds are made.

    Attributes
    ----------
    widths : list of int or None
        Widths of the embeddings trained on.
    std : :class:`numpy.ndarray`
        (n_genes,) standard deviation of the errors on training spots left out.
    """

    method: str
    genes: list[str]
    layer: str
    normalization: Normalization
    use_rep: list[str]
    library_key: str | None
    spatial_key: str
    standardize: Standardize
    random_state: int
    group_key: str | None = None
    widths: list[int] | None = field(default=None, init=False)

    def fit(self, adata: AnnData, expression: NDArray[np.floating]) -> Self:
        """Fit, once without a third of the training spots, whose errors give `std`, and once on all.

        The third is of whole individuals where there are several, else of whole sections.

        Parameters
        ----------
        adata
            Training sections.
        expression
            (n_spots, n_genes).
        """
        labels = self._labels(adata)
        self.sections = [] if self.library_key is None else np.unique(labels).tolist()
        individuals = gate.groups(adata, self.group_key, None if self.library_key is None else labels)
        self.groups = [] if individuals is None else np.unique(individuals).tolist()
        groups = labels if individuals is None or len(self.groups) < 2 else individuals
        features = self.features(adata)
        self.widths = [int(adata.obsm[key].shape[1]) for key in self.use_rep]
        estimator = METHODS[self.method].make(self.random_state)
        n_groups = len(np.unique(groups))
        splits: Any = GroupKFold(min(3, n_groups)) if n_groups > 1 else KFold(3, shuffle=True, random_state=0)
        seen, left = next(splits.split(features, groups=groups))
        fitted = _fit(clone(estimator), features[seen], expression[seen], labels[seen], groups[seen])
        errors = expression[left] - _predict(fitted, features[left], labels[left])
        self.std = np.sqrt((errors**2).mean(0))
        self.estimator = _fit(estimator, features, expression, labels, groups)
        return self

    def _labels(self, adata: AnnData) -> NDArray[np.str_]:
        """Section of each spot; without `library_key` all are one."""
        names = gate.sections(adata, self.library_key)
        return np.full(adata.n_obs, "all") if names is None else names

    def features(self, adata: AnnData) -> NDArray[np.float32]:
        """What the method sees, (n_spots, n_features): embeddings and means over neighbours, side by side."""
        niche = METHODS[self.method].niche
        widths = [None] * len(self.use_rep) if self.widths is None else self.widths
        embeddings = [gate.embedding(adata, key, width) for key, width in zip(self.use_rep, widths, strict=True)]
        names = gate.sections(adata, self.library_key, self.spatial_key)
        if niche is None:
            parts = embeddings[:1]
        else:
            sizes = sorted({n for own in niche for n in own})
            gate.check_neighbors(names, adata.n_obs, sizes)
            graphs = dict(
                zip(
                    sizes,
                    Neighborhoods.of(gate.coordinates(adata, self.spatial_key), names, sizes).graphs,
                    strict=True,
                )
            )
            parts = list(embeddings)
            for i, embedding in enumerate(embeddings):
                parts += [graphs[n] @ embedding for n in niche[min(i, 1)]]
        features = np.concatenate(parts, 1).astype(np.float32)
        if self.standardize == "section":
            labels = self._labels(adata)
            for label in np.unique(labels):
                rows = labels == label
                features[rows] = (features[rows] - features[rows].mean(0)) / (features[rows].std(0) + 1e-6)
        return features

    @check_arguments
    @in_float32
    def predict(
        self, data: Data, *, key_added: Prefix | None = None, table_name: Key | None = None, copy: bool = False
    ) -> AnnData | None:
        """Predict expression into the slots of :func:`histovar.tl.predict`.

        Parameters
        ----------
        data
            AnnData or SpatialData with embeddings and coordinates.
        key_added
            Prefix of the slots; the method's name by default.
        table_name
            Table of a SpatialData.
        copy
            Return a copy of the table instead of writing in place.

        Returns
        -------
        AnnData or None
            Writes expected expression and its standard deviation, the same for every spot, and ``uns[key_added]``.
        """
        adata = gate.table(data, table_name, writes=not copy)
        keys = Keys(self.method if key_added is None else key_added)
        slots.check_free(adata, keys, prediction_slots(keys))
        mean = _predict(self.estimator, self.features(adata), self._labels(adata)).astype(np.float32).clip(min=0)
        if copy:
            adata = gate.copied(adata)
        std = np.tile(self.std.astype(np.float32), (len(mean), 1))
        units = expression.units(self.layer, self.normalization)
        entries = {
            "units": units,
            "layer": self.layer,
            "normalization": self.normalization.plain(),
            "calibrated": False,
            "quantiles": np.array([]),
            "trained_on": np.array(self.sections, dtype=str),
            "trained_on_groups": np.array(self.groups, dtype=str),
            "params": {
                "method": self.method,
                "use_rep": np.array(self.use_rep),
                "spatial_key": self.spatial_key,
                "library_key": self.library_key or "",
                "group_key": self.group_key or "",
                "standardize": self.standardize,
            },
        }
        write_prediction(adata, keys, self.genes, Prediction(mean, std, None, None, None), entries)
        logger.info("%s predicted %d genes in %d spots, in %s", self.method, len(self.genes), adata.n_obs, units)
        return adata if copy else None


def _taken(function: Any, **arguments: Any) -> dict[str, Any]:
    """Those arguments that a function takes."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def _fit(estimator: Any, features: Any, expression: Any, sections: Any, groups: Any) -> Any:
    return estimator.fit(features, expression, **_taken(estimator.fit, sections=sections, groups=groups))


def _predict(estimator: Any, features: Any, sections: Any) -> NDArray[Any]:
    predicted: NDArray[Any] = estimator.predict(features, **_taken(estimator.predict, sections=sections))
    return predicted
