"""Fit a baseline to AnnData, and predict with it into the same slots as the model."""

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
    """A baseline method: function that makes its estimator given a seed, whether it is random, and its inputs."""

    make: Callable[[int], Any]
    is_random: bool
    niche: tuple[tuple[int, ...], tuple[int, ...]] | None
    """Sizes of neighbourhoods for the first embedding and for each further one; None: only the first embedding."""


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
    """Check the name of a method."""
    return value if value in METHODS else refuse_value(f"one of {', '.join(map(repr, METHODS))}")


MethodName = Annotated[str, AfterValidator(_method)]


@dataclass
class Baseline:
    """A fitted baseline that predicts expression into AnnData; made by :func:`histovar.tl.baseline`.

    Parameters
    ----------
    method
        Name of the method.
    genes, layer, normalization
        Genes to predict, and layer and normalisation of their expression.
    use_rep, library_key, spatial_key
        Where embeddings, sections and coordinates are in the object.
    standardize
        ``"section"`` standardises features within each section first; ``"training"`` leaves it to the method.
    random_state
        Seed.
    group_key
        Column of ``obs`` with the individual, for cross-validation.

    Attributes
    ----------
    widths : list of int or None
        Widths of the embeddings trained on.
    std : :class:`numpy.ndarray`
        (n_genes,) standard deviation of the errors on held-out training spots.
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
        """Fit to all training spots, and estimate `std` by another fit without a third of them.

        The third consists of whole individuals if there are several, else of whole sections if there are several.

        Parameters
        ----------
        adata
            Training sections.
        expression
            (n_spots, n_genes) measured expression.
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
        seen, held_out = next(splits.split(features, groups=groups))
        fitted = _fit(clone(estimator), features[seen], expression[seen], labels[seen], groups[seen])
        errors = expression[held_out] - _predict(fitted, features[held_out], labels[held_out])
        self.std = np.sqrt((errors**2).mean(0))
        self.estimator = _fit(estimator, features, expression, labels, groups)
        return self

    def _labels(self, adata: AnnData) -> NDArray[np.str_]:
        """Section of each spot; the same for all without `library_key`."""
        names = gate.sections(adata, self.library_key)
        return np.full(adata.n_obs, "all") if names is None else names

    def features(self, adata: AnnData) -> NDArray[np.float32]:
        """Features of the method: embeddings and their means over neighbours, side by side, (n_spots, n_features)."""
        niche = METHODS[self.method].niche
        widths = [None] * len(self.use_rep) if self.widths is None else self.widths
        embeddings = [gate.embedding(adata, key, width) for key, width in zip(self.use_rep, widths, strict=True)]
        names = gate.sections(adata, self.library_key, self.spatial_key)
        if niche is None:
            columns = embeddings[:1]
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
            columns = list(embeddings)
            for i, embedding in enumerate(embeddings):
                columns += [graphs[n] @ embedding for n in niche[min(i, 1)]]
        features = np.concatenate(columns, 1).astype(np.float32)
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
        """Predict expression, and write it to the slots of :func:`histovar.tl.predict`.

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
            Writes predicted expression, its standard deviation, which is the same for every spot, and
            ``uns[key_added]``. Returns the copy with `copy`, otherwise None.
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


def _select_arguments(function: Any, **arguments: Any) -> dict[str, Any]:
    """Select the arguments that a function accepts."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def _fit(estimator: Any, features: Any, expression: Any, sections: Any, groups: Any) -> Any:
    """Fit an estimator, with sections and groups if it uses them."""
    return estimator.fit(features, expression, **_select_arguments(estimator.fit, sections=sections, groups=groups))


def _predict(estimator: Any, features: Any, sections: Any) -> NDArray[Any]:
    """Predict with an estimator, with sections if it uses them."""
    predicted: NDArray[Any] = estimator.predict(features, **_select_arguments(estimator.predict, sections=sections))
    return predicted
