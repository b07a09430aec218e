"""Predicted expression in its slots: written, and read back under the names of its genes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from histovar._arguments import nearest
from histovar._keys import Keys
from histovar.metrics import METRICS
from histovar.model.observation import RATE_TOTAL, Composition, Observation, Units

from . import fingerprint, gate, slots
from .histology import source_fingerprint
from .matrix import dense, is_lazy
from .normalization import Normalization

logger = logging.getLogger(__name__)

# Entries of `uns` and columns of `var` that `tl.evaluate` writes.
EVALUATION = ("evaluation", "evaluation_groups", "evaluation_interval", "evaluated_distribution")
# Entry of `uns` with what predicted distributions are made with, of a model that learnt from counts.
OBSERVATION = "observation"
# Entry of `uns` with the correlation of each gene that its model says to expect on an unseen section.
EXPECTED_PEARSON = "expected_pearson"
# What is predicted of spots as such: total count, relative variance of rates beyond that of training spots, how many
# times as far the depth may be off, and how unlike those of training the section is (0 to 1).
SPOT_COLUMNS = ("total_count", "excess", "depth_spread", "novelty")
SCORES = tuple(metric.gene_score for metric in METRICS if metric.gene_score)


class Prediction(NamedTuple):
    """What was predicted, in memory or as dask arrays, in panel order.

    Parameters
    ----------
    mean, std
        (n_obs, n_genes).
    tokens
        (n_obs, n_tokens), or None.
    samples
        (n_obs, n_genes, n_samples), or None.
    quantiles
        (n_obs, n_genes, n_quantiles), or None.
    rates
        (n_obs, n_genes): composition in counts per 10,000, of a model that learnt from counts; or None.
    spots
        (n_obs, 4): :data:`SPOT_COLUMNS`, of the same; or None.
    """

    mean: Any
    std: Any
    tokens: Any
    samples: Any
    quantiles: Any
    rates: Any = None
    spots: Any = None

    @classmethod
    def empty(
        cls, n_obs: int, n_genes: int, n_tokens: int, n_samples: int, n_quantiles: int, *, rates: bool
    ) -> Prediction:
        """Room for a prediction; None for what was not asked for."""

        def room(n: int) -> NDArray[np.float32] | None:
            return np.empty((n_obs, n_genes, n), np.float32) if n else None

        mean, std = np.empty((2, n_obs, n_genes), np.float32)
        tokens = np.empty((n_obs, n_tokens), np.int32) if n_tokens else None
        composition = np.empty((n_obs, n_genes), np.float32) if rates else None
        spots = np.empty((n_obs, len(SPOT_COLUMNS)), np.float32) if rates else None
        return cls(mean, std, tokens, room(n_samples), room(n_quantiles), composition, spots)


def prediction_slots(keys: Keys) -> list[slots.Slot]:
    """All slots that a prediction may take."""
    matrices = [(store, key) for store in ("layers", "obsm") for key in (keys.mean, keys.std)]
    more = (keys.tokens, keys.samples, keys.quantiles, keys.rates, keys.spots, keys.source)
    cubes = [("obsm", key) for key in more]
    return [*matrices, *cubes, ("var", keys.gene)]


def score_slots(keys: Keys) -> list[slots.Slot]:
    """The slots in which :func:`histovar.tl.evaluate` leaves scores of genes."""
    return [("var", keys.score(name)) for name in SCORES]


def write_prediction(
    adata: AnnData, keys: Keys, genes: Sequence[str], made: Prediction, entries: Mapping[str, Any]
) -> None:
    """Write predicted expression: layers where the object's genes are exactly the panel, else ``obsm``.

    All that an earlier prediction left, and its scores, is dropped.

    Parameters
    ----------
    adata
        The object.
    keys
        Slot names.
    genes
        The panel, in the order of the columns.
    made
        What was predicted.
    entries
        Entries of ``uns``, among them ``params`` with ``use_rep``, ``spatial_key`` and ``library_key``.

    Raises
    ------
    ValueError
        If a slot holds what histovar did not write.
    """
    slots.check_free(adata, keys, prediction_slots(keys))
    found: dict[slots.Slot, Any] = {}
    if set(genes) == set(adata.var_names) and len(genes) == adata.n_vars:
        order = pd.Index(genes).get_indexer(adata.var_names)
        unchanged = np.array_equal(order, np.arange(len(order)))
        for key, values in ((keys.mean, made.mean), (keys.std, made.std)):
            found["layers", key] = values if unchanged else values[:, order]
        # Goes with the columns when genes are dropped, reordered or renamed.
        found["var", keys.gene] = adata.var_names.to_numpy().astype(object)
    else:
        found |= {("obsm", keys.mean): made.mean, ("obsm", keys.std): made.std}
    more = ("tokens", "samples", "quantiles", "rates", "spots")
    found |= {("obsm", getattr(keys, name)): getattr(made, name) for name in more if getattr(made, name) is not None}
    identity = _identity(genes, entries)
    source = _source(adata, entries["params"], identity)
    if source is not None:
        found["obsm", keys.source] = source
    tokens = {} if made.tokens is None else {"tokens": "predicted"}
    entries = {**entries, **tokens, "genes": np.array(genes, dtype=str), "identity": identity}
    earlier = [*prediction_slots(keys), *score_slots(keys)]
    with slots.writing(adata):
        slots.drop(adata, keys, earlier, (*EVALUATION, OBSERVATION, EXPECTED_PEARSON, "tokens"))
        slots.write(adata, keys, found, entries)


def _identity(genes: Sequence[str], entries: Mapping[str, Any]) -> str:
    """What tells a prediction from those of other genes, units or options: spots that have the same can be joined."""
    options = {name: entries["params"][name] for name in ("decoding", "method") if name in entries["params"]}
    parts = [*genes, *(repr(entries[name]) for name in ("units", "layer", "quantiles")), repr(options)]
    return str(fingerprint.of_rows(np.array(["\n".join(parts)]))[0, 0])


def _source(adata: AnnData, params: Mapping[str, Any], identity: str) -> NDArray[np.uint64] | None:
    """Fingerprints of what each spot is predicted from, and the identity; None where embeddings are on disk or gone."""
    reps = [str(key) for key in np.asarray(params["use_rep"]).ravel()]
    if any(key not in adata.obsm or is_lazy(adata.obsm[key]) for key in reps):
        return None
    library_key = str(params["library_key"]) or None
    covariates = [str(name) for name in np.asarray(params.get("covariates", ())).ravel()]
    covariates += [str(params["depth_key"])] if params.get("depth_key") else []
    source = source_fingerprint(adata, reps, str(params["spatial_key"]), library_key, covariates)
    return np.hstack([source, np.full_like(source, int(identity))])


def read_prediction(adata: AnnData, keys: Keys, genes: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and standard deviation that :func:`write_prediction` wrote, (n_obs, n_genes) in panel order.

    Raises
    ------
    KeyError
        If they are missing, wholly or of some genes.
    ValueError
        If genes were renamed since, or predictions of several models were joined.
    """
    _check_source(adata, keys)
    if keys.mean in adata.obsm:
        found = []
        for key in (keys.mean, keys.std):
            if key not in adata.obsm:
                raise KeyError(f"key: no {key!r} in obsm; predict again")
            values = adata.obsm[key]
            if isinstance(values, pd.DataFrame):  # as versions up to 0.1 wrote them
                _check_there(values.columns, genes, keys, f"obsm[{key!r}]")
                values = values[list(genes)].to_numpy()
            found.append(_numbers(values, f"obsm[{key!r}]", (adata.n_obs, len(genes))))
        return found[0], found[1]
    if keys.mean in adata.layers:
        _check_there(adata.var_names, genes, keys, "var_names")
        if keys.gene in adata.var:
            renamed = adata.var_names[adata.var[keys.gene].astype(str) != adata.var_names]
            if len(renamed):
                raise ValueError(
                    f"key: genes were renamed since the prediction {keys.prefix!r}: var_names has {renamed[0]!r} where "
                    f"{adata.var[keys.gene][renamed[0]]!r} was predicted; predict again"
                )
        if keys.std not in adata.layers:
            raise KeyError(f"key: no {keys.std!r} in layers; predict again")
        order = adata.var_names.get_indexer(pd.Index(genes))
        mean, std = (
            _numbers(dense(adata.layers[key]), f"layers[{key!r}]", adata.shape)[:, order]
            for key in (keys.mean, keys.std)
        )
        return mean, std
    raise KeyError(
        f"key: neither layers nor obsm has {keys.mean!r}; predict first with histovar.tl.predict(adata, model, "
        f"key_added={keys.prefix!r})"
    )


def read_expected_pearson(adata: AnnData, keys: Keys, n_genes: int) -> NDArray[np.float64] | None:
    """Pearson correlation to expect of each gene on an unseen section, (n_genes,); None where the model did not say.

    Raises
    ------
    ValueError
        If it is of another shape, or no numbers.
    """
    stored = slots.record(adata, keys)
    if EXPECTED_PEARSON not in stored:
        return None
    values = _numbers(stored[EXPECTED_PEARSON], f"uns[{keys.uns!r}][{EXPECTED_PEARSON!r}]", (n_genes,))
    return values.astype(np.float64)


class Composed(NamedTuple):
    """What the predictive distribution is made of, where the model learnt from counts."""

    observation: Observation
    composition: Composition
    units: Units
    depth: Tensor | None


def read_composed(adata: AnnData, keys: Keys) -> Composed | None:
    """The composition that was predicted, and how counts come from it.

    None of other predictions, and where those of models that differ in it were joined.

    Raises
    ------
    KeyError
        If a column of total counts is gone.
    ValueError
        If what was written, or that column, was changed.
    """
    stored, n_genes = slots.record(adata, keys), len(predicted_genes(adata, keys))
    found, made_with = read_rates(adata, keys, n_genes), stored.get(OBSERVATION, {})
    expected = Observation(n_genes).plain()
    if found is None or not expected.keys() <= made_with.keys():
        return None
    for name, like in expected.items():
        _numbers(made_with[name], f"uns[{keys.uns!r}][{OBSERVATION!r}][{name!r}]", like.shape)
    rates, spots = (torch.from_numpy(np.array(values, np.float32)) for values in found)
    params = stored["params"]
    depth = params["depth_key"] or (float(params["depth"]) or None)
    totals = None if depth is None else torch.from_numpy(gate.depth(adata, depth)).clamp(min=1)
    composition = Composition(rates / RATE_TOTAL, spots[:, 0].log(), spots[:, 1], spots[:, 2])
    return Composed(Observation.from_plain(made_with), composition, params["units"], totals)


def read_rates(adata: AnnData, keys: Keys, n_genes: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Predicted rates, (n_obs, n_genes), and :data:`SPOT_COLUMNS`, (n_obs, 4), of a model that learnt from counts.

    Raises
    ------
    ValueError
        If they are of another shape, or no numbers.
    """
    if keys.rates not in adata.obsm or keys.spots not in adata.obsm:
        return None
    rates = _numbers(adata.obsm[keys.rates], f"obsm[{keys.rates!r}]", (adata.n_obs, n_genes))
    return rates, _numbers(adata.obsm[keys.spots], f"obsm[{keys.spots!r}]", (adata.n_obs, len(SPOT_COLUMNS)))


def read_draws(adata: AnnData, keys: Keys, n_genes: int) -> NDArray[Any] | None:
    """Draws, (n_obs, n_genes, n_samples), where there are any.

    Raises
    ------
    ValueError
        If they are of another shape, or no numbers.
    """
    return _read_cube(adata, keys.samples, n_genes)


def read_quantiles(adata: AnnData, keys: Keys, n_genes: int) -> tuple[NDArray[Any], NDArray[np.float64]] | None:
    """Quantiles, (n_obs, n_genes, n_quantiles), and their levels, where there are any.

    Raises
    ------
    ValueError
        If they are of another shape, or no numbers.
    """
    cube = _read_cube(adata, keys.quantiles, n_genes)
    if cube is None:
        return None
    levels = _numbers(slots.record(adata, keys)["quantiles"], f"uns[{keys.uns!r}]['quantiles']", cube.shape[2:])
    return cube, levels.astype(np.float64)


def _read_cube(adata: AnnData, key: str, n_genes: int) -> NDArray[Any] | None:
    if key not in adata.obsm:
        return None
    values = adata.obsm[key]
    return _numbers(values, f"obsm[{key!r}]", (adata.n_obs, n_genes, *np.shape(values)[2:3]), n_axes=3)


def _numbers(values: Any, slot: str, shape: tuple[int, ...], n_axes: int | None = None) -> NDArray[Any]:
    """The array of a slot, refused if it is no longer as it was written."""
    array = np.asarray(values)
    if array.shape != shape or array.ndim != (n_axes or len(shape)) or array.dtype.kind not in "fiu":
        raise ValueError(
            f"key: {slot} holds {array.dtype} of shape {array.shape}, expected numbers of "
            f"{' x '.join(map(str, shape))}; it was changed since: predict again"
        )
    return array


def _check_there(names: pd.Index, genes: Sequence[str], keys: Keys, where: str) -> None:
    missing = [gene for gene in genes if gene not in names]
    if missing:
        raise KeyError(
            f"key: {len(missing)} of the {len(genes)} genes of the prediction {keys.prefix!r} are missing from "
            f"{where}, such as {missing[:3]}; genes were dropped or renamed since: take them from "
            "histovar.get.prediction(adata) of the whole object, or predict again"
        )


def _check_source(adata: AnnData, keys: Keys) -> None:
    """Refuse spots of another prediction; warn where what they were predicted from has changed since."""
    if keys.source not in adata.obsm:
        return
    then = np.asarray(adata.obsm[keys.source])
    identity = str(slots.record(adata, keys).get("identity", "0"))
    others = int((then[:, 1] != int(identity)).sum())
    if others:
        raise ValueError(
            f"key: {others} spots have a prediction {keys.prefix!r} of other genes, units or options than "
            f"uns[{keys.uns!r}] describes, as where predictions of two models were joined; predict again with one"
        )
    try:
        now = _source(adata, slots.record(adata, keys)["params"], identity)
    except (KeyError, ValueError):
        return
    if now is not None:
        changed = int((then[:, 0] != now[:, 0]).sum())
        if changed:
            logger.warning(
                "embeddings, coordinates, sections or covariates of %d spots have changed since the prediction %r: "
                "predict again",
                changed,
                keys.prefix,
            )


def predicted_genes(adata: AnnData, keys: Keys) -> list[str]:
    """The panel of a prediction.

    Raises
    ------
    KeyError
        If there is no prediction, or it is not known of which genes.
    ValueError
        If what ``uns`` says of it was changed.
    """
    stored = slots.record(adata, keys)
    genes, params = stored.get("genes"), stored.get("params", {})
    if not isinstance(params, Mapping):
        params = {}
    needed = {"genes", "units", "layer", "params", *(["quantiles"] if keys.quantiles in adata.obsm else [])}
    needed |= {"library_key", "spatial_key", "use_rep", *(["depth", "depth_key"] if OBSERVATION in stored else [])}
    if not needed <= {*stored, *params}:
        if keys.mean in adata.layers or keys.mean in adata.obsm:
            raise KeyError(
                f"key: there is a prediction {keys.prefix!r}, but uns[{keys.uns!r}] has no "
                f"{sorted(needed - {*stored, *params})}, as after anndata.concat: join predictions "
                "of the same genes and options with anndata.concat(..., uns_merge='same')"
            )
        there = [k for k, v in adata.uns.items() if isinstance(v, Mapping) and {"genes", "units", "params"} <= {*v}]
        raise KeyError(
            f"key: uns has no prediction {keys.uns!r}; it has {there or 'none'}: name one, or predict first with "
            f"histovar.tl.predict(adata, model, key_added={keys.prefix!r})"
        )
    expected = {"normalization": Mapping, OBSERVATION: Mapping, "identity": str}
    for name, kind in expected.items():
        if name in stored and not (isinstance(stored[name], kind) and (kind is Mapping or stored[name].isdecimal())):
            raise ValueError(f"key: uns[{keys.uns!r}][{name!r}] is not what histovar wrote; predict again")
    return [str(g) for g in np.asarray(genes).ravel()]


def genes_of_panel(panel: Sequence[str], genes: Sequence[str] | None) -> list[str]:
    """Genes that were asked for, or else all of the panel.

    Raises
    ------
    KeyError
        If one is not in the panel.
    """
    unknown = [gene for gene in genes or () if gene not in panel]
    if unknown:
        near = nearest(unknown, panel)
        meant = f"; did you mean {', '.join(near)}?" if near else ""
        raise KeyError(
            f"genes: {unknown} are not among the {len(panel)} genes of the model ({list(panel[:3])}, ...){meant}"
        )
    return list(panel if genes is None else genes)


def predicted_sections(adata: AnnData, keys: Keys, library_key: str | None) -> NDArray[np.str_] | None:
    """Section of each spot, by a column that is named, or else by that of the prediction."""
    params = slots.record(adata, keys)["params"]
    if library_key is None:
        library_key = str(params["library_key"]) or None
    return gate.sections(adata, library_key, str(params["spatial_key"]))


def predicted_normalization(adata: AnnData, keys: Keys) -> Normalization | None:
    """How the expression is normalised that a prediction is to equal; None in files of earlier versions."""
    return Normalization.stored(slots.record(adata, keys).get("normalization"))
