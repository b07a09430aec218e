"""Write predicted expression into its slots, and read it back."""

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

from histovar._arguments import did_you_mean, nearest
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
# Entry of `uns` with the parameters of predicted distributions, for a model that learnt from counts.
OBSERVATION = "observation"
# Entry of `uns` with each gene's expected correlation on an unseen section, according to its model.
EXPECTED_PEARSON = "expected_pearson"
# Columns of obsm[keys.spots]: total count; relative variance of rates in excess of training spots; factor by which the
# depth is more uncertain than for training spots; novelty of the section (0 to 1).
SPOT_COLUMNS = ("total_count", "excess", "depth_spread", "novelty")
SCORES = tuple(metric.gene_score for metric in METRICS if metric.gene_score)


class Prediction(NamedTuple):
    """A prediction of all spots, in memory or as dask arrays, with genes in the order of the panel.

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
        (n_obs, n_genes) composition in counts per 10,000, from a model that learnt from counts; or None.
    spots
        (n_obs, 4) :data:`SPOT_COLUMNS`, from a model that learnt from counts; or None.
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
        """Allocate arrays for a prediction; those not requested are None."""

        def cube(n: int) -> NDArray[np.float32] | None:
            return np.empty((n_obs, n_genes, n), np.float32) if n else None

        mean, std = np.empty((2, n_obs, n_genes), np.float32)
        tokens = np.empty((n_obs, n_tokens), np.int32) if n_tokens else None
        composition = np.empty((n_obs, n_genes), np.float32) if rates else None
        spots = np.empty((n_obs, len(SPOT_COLUMNS)), np.float32) if rates else None
        return cls(mean, std, tokens, cube(n_samples), cube(n_quantiles), composition, spots)


def prediction_slots(keys: Keys) -> list[slots.Slot]:
    """List all slots that a prediction may use."""
    matrices = [(store, key) for store in ("layers", "obsm") for key in (keys.mean, keys.std)]
    optional = (keys.tokens, keys.samples, keys.quantiles, keys.rates, keys.spots, keys.source)
    return [*matrices, *(("obsm", key) for key in optional), ("var", keys.gene)]


def score_slots(keys: Keys) -> list[slots.Slot]:
    """List the slots to which :func:`histovar.tl.evaluate` writes scores of genes."""
    return [("var", keys.score(name)) for name in SCORES]


def write_prediction(
    adata: AnnData, keys: Keys, genes: Sequence[str], prediction: Prediction, entries: Mapping[str, Any]
) -> None:
    """Write a prediction: to ``layers`` if the object's genes are exactly the panel, otherwise to ``obsm``.

    All slots of an earlier prediction and its scores are deleted.

    Parameters
    ----------
    adata
        The object.
    keys
        Slot names.
    genes
        The panel, in the order of the columns.
    prediction
        The prediction.
    entries
        Entries of ``uns``, among them ``params`` with ``use_rep``, ``spatial_key`` and ``library_key``.

    Raises
    ------
    ValueError
        If a slot holds data that histovar did not write.
    """
    slots.check_free(adata, keys, prediction_slots(keys))
    contents: dict[slots.Slot, Any] = {}
    if set(genes) == set(adata.var_names) and len(genes) == adata.n_vars:
        order = pd.Index(genes).get_indexer(adata.var_names)
        unchanged = np.array_equal(order, np.arange(len(order)))
        for key, values in ((keys.mean, prediction.mean), (keys.std, prediction.std)):
            contents["layers", key] = values if unchanged else values[:, order]
        # Follows the columns when genes are dropped, reordered or renamed.
        contents["var", keys.gene] = adata.var_names.to_numpy().astype(object)
    else:
        contents |= {("obsm", keys.mean): prediction.mean, ("obsm", keys.std): prediction.std}
    for name in ("tokens", "samples", "quantiles", "rates", "spots"):
        if (values := getattr(prediction, name)) is not None:
            contents["obsm", getattr(keys, name)] = values
    identity = _identity(genes, entries)
    source = _source(adata, entries["params"], identity)
    if source is not None:
        contents["obsm", keys.source] = source
    tokens = {} if prediction.tokens is None else {"tokens": "predicted"}
    entries = {**entries, **tokens, "genes": np.array(genes, dtype=str), "identity": identity}
    earlier = [*prediction_slots(keys), *score_slots(keys)]
    with slots.writing(adata):
        slots.drop(adata, keys, earlier, (*EVALUATION, OBSERVATION, EXPECTED_PEARSON, "tokens"))
        slots.write(adata, keys, contents, entries)


def _identity(genes: Sequence[str], entries: Mapping[str, Any]) -> str:
    """Fingerprint of a prediction's genes, units and options; spots with the same one can be concatenated."""
    options = {name: entries["params"][name] for name in ("decoding", "method") if name in entries["params"]}
    lines = [*genes, *(repr(entries[name]) for name in ("units", "layer", "quantiles")), repr(options)]
    return str(fingerprint.of_rows(np.array(["\n".join(lines)]))[0, 0])


def _source(adata: AnnData, params: Mapping[str, Any], identity: str) -> NDArray[np.uint64] | None:
    """Fingerprint of each spot's inputs beside the identity, (n_obs, 2); None if embeddings are on disk or missing."""
    reps = [str(key) for key in np.asarray(params["use_rep"]).ravel()]
    if any(key not in adata.obsm or is_lazy(adata.obsm[key]) for key in reps):
        return None
    library_key = str(params["library_key"]) or None
    covariates = [str(name) for name in np.asarray(params.get("covariates", ())).ravel()]
    covariates += [str(params["depth_key"])] if params.get("depth_key") else []
    source = source_fingerprint(adata, reps, str(params["spatial_key"]), library_key, covariates)
    return np.hstack([source, np.full_like(source, int(identity))])


def read_prediction(adata: AnnData, keys: Keys, genes: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read the predicted mean and standard deviation, (n_obs, n_genes) in panel order.

    Raises
    ------
    KeyError
        If they are missing, for all or some genes.
    ValueError
        If genes were renamed since, or predictions of several models were concatenated.
    """
    _check_source(adata, keys)
    if keys.mean in adata.obsm:
        matrices = []
        for key in (keys.mean, keys.std):
            if key not in adata.obsm:
                raise KeyError(f"key: no {key!r} in obsm; predict again")
            values = adata.obsm[key]
            if isinstance(values, pd.DataFrame):  # written by version 0.1
                _check_genes(values.columns, genes, keys, f"obsm[{key!r}]")
                values = values[list(genes)].to_numpy()
            matrices.append(_numbers(values, f"obsm[{key!r}]", (adata.n_obs, len(genes))))
        return matrices[0], matrices[1]
    if keys.mean in adata.layers:
        _check_genes(adata.var_names, genes, keys, "var_names")
        if keys.gene in adata.var:
            renamed = adata.var_names[adata.var[keys.gene].astype(str) != adata.var_names]
            if len(renamed):
                raise ValueError(
                    f"key: genes were renamed since the prediction {keys.prefix!r}: the column of "
                    f"{adata.var[keys.gene][renamed[0]]!r} is now {renamed[0]!r} in var_names; predict again"
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
    """Read each gene's expected Pearson correlation on an unseen section, (n_genes,); None if the model had none.

    Raises
    ------
    ValueError
        If the entry has another shape or is not numeric.
    """
    stored = slots.record(adata, keys)
    if EXPECTED_PEARSON not in stored:
        return None
    values = _numbers(stored[EXPECTED_PEARSON], f"uns[{keys.uns!r}][{EXPECTED_PEARSON!r}]", (n_genes,))
    return values.astype(np.float64)


class Composed(NamedTuple):
    """Composition, units, depth and count model: the predictive distribution of a model that learnt from counts."""

    observation: Observation
    composition: Composition
    units: Units
    depth: Tensor | None


def read_composed(adata: AnnData, keys: Keys) -> Composed | None:
    """Read the predicted composition and the count model that turns it into a distribution.

    None for predictions of other models, and for concatenated ones of models whose count models differ.

    Raises
    ------
    KeyError
        If the column of total counts is missing.
    ValueError
        If a slot or that column was changed.
    """
    stored, n_genes = slots.record(adata, keys), len(predicted_genes(adata, keys))
    rates_and_spots, observation = read_rates(adata, keys, n_genes), stored.get(OBSERVATION, {})
    template = Observation(n_genes).plain()
    if rates_and_spots is None or not template.keys() <= observation.keys():
        return None
    for name, values in template.items():
        _numbers(observation[name], f"uns[{keys.uns!r}][{OBSERVATION!r}][{name!r}]", values.shape)
    rates, spots = (torch.from_numpy(np.array(values, np.float32)) for values in rates_and_spots)
    params = stored["params"]
    depth = params["depth_key"] or (float(params["depth"]) or None)
    totals = None if depth is None else torch.from_numpy(gate.depth(adata, depth)).clamp(min=1)
    composition = Composition(rates / RATE_TOTAL, spots[:, 0].log(), spots[:, 1], spots[:, 2])
    return Composed(Observation.from_plain(observation), composition, params["units"], totals)


def read_rates(adata: AnnData, keys: Keys, n_genes: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Read rates, (n_obs, n_genes), and :data:`SPOT_COLUMNS`, (n_obs, 4), predicted by a model that learnt from counts.

    Raises
    ------
    ValueError
        If a slot has another shape or is not numeric.
    """
    if keys.rates not in adata.obsm or keys.spots not in adata.obsm:
        return None
    rates = _numbers(adata.obsm[keys.rates], f"obsm[{keys.rates!r}]", (adata.n_obs, n_genes))
    return rates, _numbers(adata.obsm[keys.spots], f"obsm[{keys.spots!r}]", (adata.n_obs, len(SPOT_COLUMNS)))


def read_draws(adata: AnnData, keys: Keys, n_genes: int) -> NDArray[Any] | None:
    """Read draws, (n_obs, n_genes, n_samples); None if there are none.

    Raises
    ------
    ValueError
        If the slot has another shape or is not numeric.
    """
    return _read_cube(adata, keys.samples, n_genes)


def read_quantiles(adata: AnnData, keys: Keys, n_genes: int) -> tuple[NDArray[Any], NDArray[np.float64]] | None:
    """Read quantiles, (n_obs, n_genes, n_quantiles), and their levels; None if there are none.

    Raises
    ------
    ValueError
        If the slot has another shape or is not numeric.
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
    """Convert a slot to an array; refuse it if its shape or type is not as written."""
    array = np.asarray(values)
    if array.shape != shape or array.ndim != (n_axes or len(shape)) or array.dtype.kind not in "fiu":
        raise ValueError(
            f"key: {slot} holds {array.dtype} of shape {array.shape}, expected numbers of shape "
            f"{' x '.join(map(str, shape))}; it was changed since the prediction: predict again"
        )
    return array


def _check_genes(names: pd.Index, genes: Sequence[str], keys: Keys, where: str) -> None:
    missing = [gene for gene in genes if gene not in names]
    if missing:
        raise KeyError(
            f"key: {len(missing)} of the {len(genes)} genes of the prediction {keys.prefix!r} are missing from "
            f"{where}, such as {missing[:3]}; genes were dropped or renamed since: call "
            "histovar.get.prediction(adata) on the object before that, or predict again"
        )


def _check_source(adata: AnnData, keys: Keys) -> None:
    """Refuse spots of another prediction; warn if the inputs of spots have changed since."""
    if keys.source not in adata.obsm:
        return
    recorded = np.asarray(adata.obsm[keys.source])
    identity = str(slots.record(adata, keys).get("identity", "0"))
    n_other = int((recorded[:, 1] != int(identity)).sum())
    if n_other:
        raise ValueError(
            f"key: {n_other} spots have a prediction {keys.prefix!r} of other genes, units or options than "
            f"uns[{keys.uns!r}] describes, as if predictions of two models were concatenated; predict all spots with "
            "one model"
        )
    try:
        current = _source(adata, slots.record(adata, keys)["params"], identity)
    except (KeyError, ValueError):
        return
    if current is not None:
        changed = int((recorded[:, 0] != current[:, 0]).sum())
        if changed:
            logger.warning(
                "embeddings, coordinates, sections or covariates of %d spots have changed since the prediction %r: "
                "predict again",
                changed,
                keys.prefix,
            )


def predicted_genes(adata: AnnData, keys: Keys) -> list[str]:
    """Read the genes of a prediction, in panel order.

    Raises
    ------
    KeyError
        If there is no prediction, or ``uns`` does not describe it.
    ValueError
        If its entry of ``uns`` was changed.
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
                f"{sorted(needed - {*stored, *params})}, as after anndata.concat: concatenate predictions "
                "of the same genes and options with anndata.concat(..., uns_merge='same')"
            )
        others = [k for k, v in adata.uns.items() if isinstance(v, Mapping) and {"genes", "units", "params"} <= {*v}]
        raise KeyError(
            f"key: uns has no prediction {keys.uns!r}; it has {others or 'none'}: name one, or predict first with "
            f"histovar.tl.predict(adata, model, key_added={keys.prefix!r})"
        )
    expected = {"normalization": Mapping, OBSERVATION: Mapping, "identity": str}
    for name, kind in expected.items():
        if name in stored and not (isinstance(stored[name], kind) and (kind is Mapping or stored[name].isdecimal())):
            raise ValueError(f"key: uns[{keys.uns!r}][{name!r}] was changed since the prediction; predict again")
    return [str(g) for g in np.asarray(genes).ravel()]


def genes_of_panel(panel: Sequence[str], genes: Sequence[str] | None) -> list[str]:
    """Check that genes are in the panel; all of the panel if `genes` is None.

    Raises
    ------
    KeyError
        If a gene is not in the panel.
    """
    unknown = [gene for gene in genes or () if gene not in panel]
    if unknown:
        suggestion = did_you_mean(nearest(unknown, panel))
        raise KeyError(
            f"genes: {unknown} are not among the {len(panel)} genes of the model ({list(panel[:3])}, ...){suggestion}"
        )
    return list(panel if genes is None else genes)


def predicted_sections(adata: AnnData, keys: Keys, library_key: str | None) -> NDArray[np.str_] | None:
    """Read the section of each spot, from `library_key` or else the column that was used for the prediction."""
    params = slots.record(adata, keys)["params"]
    if library_key is None:
        library_key = str(params["library_key"]) or None
    return gate.sections(adata, library_key, str(params["spatial_key"]))


def predicted_normalization(adata: AnnData, keys: Keys) -> Normalization | None:
    """Normalisation of the expression that was predicted; None in files of earlier versions."""
    return Normalization.stored(slots.record(adata, keys).get("normalization"))
