"""Predict expression, its uncertainty and tokens from histology embeddings."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from pydantic import Field

from histovar._arguments import (
    Count,
    Depth,
    Key,
    KeyOrKeys,
    Number,
    Positive,
    Probabilities,
    Seed,
    Share,
    check_arguments,
)
from histovar._keys import DEFAULT_KEY, LOGNORM, Keys, Prefix
from histovar._limits import MOST_SAMPLES
from histovar._memory import check_fits
from histovar._spots import section_numbers
from histovar._torch_state import in_float32
from histovar.anndata_io import gate, slots
from histovar.anndata_io.embeddings import check_like_training
from histovar.anndata_io.gate import Data
from histovar.anndata_io.histology import histology, warn_of_novelty
from histovar.anndata_io.lazy import is_lazy
from histovar.anndata_io.prediction import EXPECTED_PEARSON, OBSERVATION, prediction_slots, write_prediction
from histovar.metrics.gene_trust import gene_table
from histovar.model import Decoding
from histovar.model.decoding import Mode
from histovar.model.network import Precision
from histovar.model.observation import Units
from histovar.prediction import Device, Predictor, predict_lazily

from ._trained import Trained

logger = logging.getLogger(__name__)

IN_WORDS = {"log_counts": "log1p(counts)", "counts": "counts", "rates": "counts per 10,000, without counting noise"}


@check_arguments
@in_float32
def predict(
    data: Data,
    model: Trained,
    *,
    use_rep: KeyOrKeys | None = None,
    library_key: Key | None = None,
    spatial_key: Key | None = None,
    units: Units | None = None,
    depth: Depth | None = None,
    decoding: Mode = "expected",
    n_samples: Annotated[Number, Field(le=MOST_SAMPLES)] = 0,
    quantiles: Probabilities = (),
    tokens: bool = True,
    temperature: Positive = 1.0,
    top_k: Number = 0,
    top_p: Share = 1.0,
    key_added: Prefix = DEFAULT_KEY,
    batch_size: Count = 64,
    device: Device = "auto",
    precision: Precision = "fp32",
    random_state: Seed = 0,
    show_progress_bar: bool = False,
    table_name: Key | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Predict expression, its standard deviation and tokens from histology embeddings.

    Parameters
    ----------
    data
        AnnData or SpatialData with embeddings and coordinates; it needs no genes. If embeddings are dask (or zarr)
        arrays, the results are dask arrays in the same chunks, computed lazily by the active scheduler.
    model
        A model with both stages trained.
    use_rep, library_key, spatial_key
        As in :func:`train_stage2`; what the model was trained with by default.
    units
        Units of the prediction: None for those of training; or, if the model learnt from counts, ``"lognorm"``, log1p
        of counts normalised as in training; ``"log_counts"``, log1p of counts; ``"counts"``; ``"rates"``, expected
        counts per 10,000, without counting noise.
    depth
        Total count of each spot, over all genes measured in training, at which to predict: a column of ``obs`` (each
        spot's own, to compare with the measurement); a number from 1 to 1e9, as if all spots were sequenced to it, so
        that maps of sections can be compared; None to predict it from histology, including its uncertainty. Only if the
        model learnt from counts; rates do not depend on it.
    decoding
        ``"expected"`` (best for maps), ``"greedy"`` or ``"sample"``, a single draw.
    n_samples
        Number of joint draws of each spot to add, which keep co-expression. Each draw is of tokens given one ensemble
        member, so that draws vary both by the tokens' distribution and by the members' disagreement. If the model
        learnt from counts or is calibrated, draws keep these ranks and take values of the predicted distribution.
    quantiles
        Quantiles to add, such as ``(0.05, 0.95)``: those of the predicted distribution if the model learnt from counts
        or is calibrated, otherwise those of the draws, which needs `n_samples`. For counts they are ends of intervals:
        a value belongs to an interval if at least half of its probability lies inside; if less, the next value towards
        the median is given.
    tokens
        Whether to write the tokens. Without them, expression, its uncertainty and quantiles stay the same and are
        predicted several times faster if the model learnt from counts and its gates are shut, as they mostly are
        (training logs them): the transformer is then skipped.
    temperature, top_k, top_p
        Options of sampling; see :class:`histovar.model.Decoding`.
    key_added
        Prefix of the slots.
    batch_size
        Spots in a batch.
    device
        ``"auto"`` (CUDA if there is any, else the CPU) or a torch device.
    precision
        ``"fp32"``, or ``"bf16"`` for the transformer and its products with the codes: faster on hardware that supports
        it, several times slower on CPUs that do not; means change by less than a hundredth of a gene's standard
        deviation.
    random_state
        Seed of the draws. Each chunk of dask arrays has its own draws.
    show_progress_bar
        Show progress; for dask arrays, use dask's own.
    table_name
        Table of a SpatialData.
    copy
        Return a copy of the table instead of writing in place.

    Returns
    -------
    AnnData or None
        Writes expected expression and its standard deviation, float32: to ``layers[key_added]`` and
        ``layers[f"{key_added}_std"]`` if the object's genes are exactly the panel, otherwise to ``obsm`` under the same
        names, with columns in the order of ``uns[key_added]["genes"]``; :func:`histovar.get.prediction` returns them
        with the genes' names. Also writes, with `tokens`, ``obsm[f"{key_added}_tokens"]`` (n_obs, n_tokens);
        ``obsm[f"{key_added}_source"]``, a fingerprint of each spot's inputs, by which an outdated prediction is
        recognised; if requested, ``obsm[f"{key_added}_samples"]`` (n_obs, n_genes, n_samples) and
        ``obsm[f"{key_added}_quantiles"]``; and ``uns[key_added]``, whose ``"expected_pearson"`` has each gene's
        expected correlation on an unseen section if the model holds it (:func:`histovar.get.genes`). Slots of an
        earlier prediction with this prefix are replaced or deleted.

        If the model learnt from counts and decoding is ``"expected"``, also writes ``obsm[f"{key_added}_rates"]``
        (n_obs, n_genes), counts per 10,000 in the order of the panel; ``obsm[f"{key_added}_spots"]`` (n_obs, 4), the
        spot's predicted total count, the relative variance of its rates in excess of training spots, the factor by
        which its depth is more uncertain than that of training spots, and the novelty of its section (0 to 1); and
        ``uns[key_added]["observation"]``, the parameters that turn these into distributions of counts. The standard
        deviation is then that of negative binomial counts, including the members' disagreement and, if `depth` is None,
        the uncertainty of the depth; for rates, the uncertainty of the rates alone.

        For other models, the standard deviation combines the tokens' distribution with the disagreement between
        members. If the model is calibrated (:func:`calibrate`) and decoding is ``"expected"``, standard deviation,
        draws and quantiles are calibrated, and ``uns[key_added]["calibrated"]`` is true. Negative values, which
        expression cannot have, are set to 0.

    Raises
    ------
    KeyError
        If embeddings, coordinates, sections or covariates are missing.
    ValueError
        If stage 2 is not trained, an option is out of range, or the input differs from that of training.
    """
    adata = gate.table(data, table_name, writes=not copy)
    keys = Keys(key_added)
    slots.check_free(adata, keys, prediction_slots(keys))
    registry, config = model.registry, model.config
    rule = Decoding(decoding, temperature, top_k, top_p)
    sampling = Decoding("sample", temperature, top_k, top_p)
    totals = _depth(adata, model, units, depth, decoding)
    predictor = Predictor(
        rule, sampling, units or "lognorm", n_samples, tuple(quantiles), tokens, batch_size, device, precision
    )
    calibrated = predictor.is_calibrated(model)
    if len(quantiles) and n_samples < 2 and not calibrated and not predictor.is_of_counts(model):
        raise ValueError(
            f"quantiles: without calibration they are those of draws; pass n_samples=, such as 100 (got {n_samples}), "
            "or calibrate the model with histovar.tl.calibrate"
        )
    changed = {"temperature": temperature != 1, "top_k": top_k != 0, "top_p": top_p != 1}
    if any(changed.values()) and not n_samples and decoding != "sample":
        name = next(name for name, given in changed.items() if given)
        raise ValueError(f"{name}: nothing is drawn; pass n_samples= or decoding='sample', or leave it out")
    reps = registry["use_rep"] if use_rep is None else list(use_rep)  # a single key has become a list
    if reps != registry["use_rep"] and sorted(reps) == sorted(registry["use_rep"]):
        raise ValueError(f"use_rep: {reps} is not in the order of training, {registry['use_rep']}")
    slots_used: dict[str, Any] = {
        "use_rep": reps,
        "spatial_key": registry["spatial_key"] if spatial_key is None else spatial_key,
        "library_key": _known_section(adata, registry["library_key"]) if library_key is None else library_key,
    }
    check_like_training(adata, reps, registry.get("embeddings", []))
    condition = {**slots_used, "encoders": registry["covariates"], "spacing_um": registry.get("spacing_um")}
    lazy = is_lazy(adata, reps)
    if not lazy:
        n_values = adata.n_obs * config.n_genes * (n_samples + len(quantiles))
        what = f"n_samples: {n_samples:,} draws of {config.n_genes:,} genes in {adata.n_obs:,} spots"
        check_fits(4 * n_values, what, "request fewer")
    names = gate.sections(adata, slots_used["library_key"])
    place = _adapted_place(adata, model, names, slots_used["spatial_key"])
    if lazy:
        prediction = predict_lazily(adata, model, predictor, random_state, depth=totals, place=place, **condition)
    else:
        inputs = histology(adata, config, **condition, key=key_added)
        numbers = torch.from_numpy(section_numbers(names, adata.n_obs))
        inputs = model.var_stage.condition.align(inputs.map(lambda t: t.to(model.device)), numbers.to(model.device))
        labels = np.full(adata.n_obs, "all spots") if names is None else names
        warn_of_novelty(inputs.novelty.cpu().numpy(), labels)
        prediction = predictor(
            model, inputs, random_state, depth=totals, place=place, show_progress_bar=show_progress_bar
        )

    if copy:
        adata = gate.copied(adata)
    genes, described = registry["genes"], _described(registry, units, depth)
    write_prediction(
        adata,
        keys,
        genes,
        prediction,
        {
            **described,
            **({OBSERVATION: model.var_stage.observation.plain()} if predictor.is_of_counts(model) else {}),
            **_expected_pearson(registry),
            "calibrated": calibrated,
            "adapted_to": registry.get("adapted", {}).get("section", ""),
            "n_adapted_spots": registry.get("adapted", {}).get("n_spots", 0),
            "quantiles": np.array(quantiles, dtype=float),
            "trained_on": np.array(registry["sections_stage2"], dtype=str),
            "trained_on_groups": np.array(registry.get("groups_stage2", []), dtype=str),
            "params": {
                "use_rep": np.array(reps),
                "spatial_key": slots_used["spatial_key"],
                "library_key": slots_used["library_key"] or "",
                "group_key": registry.get("group_key") or "",
                "covariates": np.array(list(registry["covariates"]), dtype=str),
                "decoding": decoding,
                "units": units or ("lognorm" if model.var_stage.of_counts else ""),
                "depth": 0.0 if depth is None or isinstance(depth, str) else float(depth),
                "depth_key": depth if isinstance(depth, str) else "",
                "n_samples": n_samples,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "random_state": random_state,
            },
        },
    )
    logger.info(
        "%s %d genes in %d spots, in %s, intervals %s",
        "prepared, to be computed lazily:" if lazy else "predicted",
        len(genes),
        adata.n_obs,
        described["units"],
        "calibrated" if calibrated else "not calibrated",
    )
    return adata if copy else None


def _depth(
    adata: AnnData, model: Trained, units: Units | None, depth: str | float | None, decoding: Mode
) -> torch.Tensor | None:
    """Total count of every spot at which to predict; None if it is to be predicted."""
    if units is None and depth is None:
        return None
    if model.config.n_members == 0:
        raise ValueError("units, depth: the model has no prior (n_members=0), which would learn rates and depth")
    if units == "rates" and depth is not None:
        raise ValueError("depth: rates do not depend on depth; leave it out, or use units='counts'")
    if not model.var_stage.of_counts:
        raise ValueError(
            f"units, depth: the model learnt from values of {model.registry['layer']!r}, whose dependence on depth is "
            "unknown; train with counts in X and without layer="
        )
    if decoding != "expected":
        raise ValueError(f"units, depth: only with decoding='expected', got {decoding!r}; n_samples= adds draws")
    return None if depth is None else torch.from_numpy(gate.depth(adata, depth)).clamp(min=1)


def _expected_pearson(registry: dict[str, Any]) -> dict[str, Any]:
    """Entry of ``uns`` with each gene's expected correlation on an unseen section; empty if the model has none."""
    if registry.get("trust") is None:
        return {}
    return {EXPECTED_PEARSON: gene_table(registry)["expected_pearson"].to_numpy()}


def _adapted_place(
    adata: AnnData, model: Trained, names: NDArray[np.str_] | None, spatial_key: str
) -> torch.Tensor | None:
    """Coordinates of spots in the section that the model is adapted to, NaN for others; None if there are none.

    A section without a name is recognised by its measured spots, which must be among those to predict.
    """
    adapted, adaptation = model.registry.get("adapted"), model.var_stage.adaptation
    if adapted is None or adaptation is None:
        return None
    section = adapted["section"]
    in_section = np.full(adata.n_obs, not section) if names is None else names == section
    coordinates = None
    if in_section.any():
        coordinates = gate.coordinates(adata, spatial_key).astype(np.float32)
        present, measured = (
            set(map(tuple, xy.tolist())) for xy in (coordinates[in_section], adaptation.place.cpu().numpy())
        )
        in_section &= bool(section) or measured <= present
    if not in_section.all():
        logger.warning(
            "the model is adapted to %s, but %d spots belong to other sections, whose levels may differ and whose "
            "intervals may be too narrow; predict them with the model as it was trained",
            f"section {section!r}" if section else "the section of its measured spots",
            int((~in_section).sum()),
        )
    return (
        None
        if coordinates is None
        else torch.from_numpy(np.where(in_section[:, None], coordinates, np.float32(np.nan)))
    )


def _described(registry: dict[str, Any], units: Units | None, depth: str | float | None) -> dict[str, Any]:
    """Entries of ``uns`` that describe the expression that is predicted: units, layer, normalisation."""
    at = ""
    if depth is not None:
        at = " at the depth of " + (f"obs[{depth!r}]" if isinstance(depth, str) else f"{depth:,.0f} counts")
    if units in (None, LOGNORM):
        normalization = registry.get("normalization", {})
        return {"units": registry["units"] + at, "layer": registry["layer"], "normalization": normalization}
    return {"units": IN_WORDS[units] + at, "layer": units, "normalization": {}}


def _known_section(adata: AnnData, library_key: str | None) -> str | None:
    """Column of sections in training if the object has it; else None with a warning, for an object of one section."""
    if library_key is not None and library_key not in adata.obs:
        logger.warning(
            "no %r in obs: all spots are treated as one section; name another column with library_key", library_key
        )
        return None
    return library_key
