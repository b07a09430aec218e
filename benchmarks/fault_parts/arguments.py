"""Wrong arguments of every public function and command: each must be refused in one line, and change nothing.

Part "arguments" of ``benchmarks/faults.py``. Every parameter gets every value of :data:`VALUES`; its kind tells which
of them are valid. A case goes well if a valid value is accepted, or a wrong one refused by histovar's own checks in one
line that names the argument, with data, model and figures unchanged. Else it is

- accepted: a wrong value was accepted,
- traceback: the error is not histovar's own, has several lines or does not name the argument,
- changed: data or model are not as they were, or a figure is left open,
- refused, but valid.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import logging
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tifffile
import torch
from anndata import AnnData
from scipy import sparse
from scipy.ndimage import gaussian_filter

import histovar as hv
from histovar.cli import main as command_line
from histovar.training import TrainingOptions

PACKAGE = str(Path(hv.__file__).parent)
EMBEDDING = "X_histology"
# Share of valid calls that are made, of those that take a second or more.
SLOW_SHARE = 0.03

VALUES: dict[str, Any] = {
    "None": None,
    "true": True,
    "NumPy false": np.bool_(False),
    "text": "text",
    "empty text": "",
    "number as text": "1",
    "truth as text": "True",
    "bytes": b"text",
    "minus one": -1,
    "zero": 0,
    "one": 1,
    "NumPy integer": np.int64(3),
    "half": 0.5,
    "fraction": 1.5,
    "NaN": float("nan"),
    "NumPy NaN": np.float32("nan"),
    "infinity": float("inf"),
    "billion": 10**9,
    "beyond 64 bits": 10**30,
    "huge float": 1e300,
    "complex": 1j,
    "empty list": [],
    "list of text": ["text"],
    "list of numbers": [1, 2],
    "list that falls": [2, 1],
    "list of None": [None],
    "list of truths": [True, False],
    "nested list": [[1.0]],
    "set": {"text"},
    "dictionary": {"a": 1},
    "empty dictionary": {},
    "array": np.ones((2, 2)),
    "array of text": np.array(["a", "b"]),
    "object": object(),
    "class": int,
    "function": len,
}
WHOLE = {"one", "NumPy integer", "billion"}
NAMES = {"text", "number as text", "truth as text"}
# Valid values by kind of parameter; "?" before a kind also allows None.
KINDS: dict[str, set[str]] = {
    "nothing": set(),
    "count": WHOLE,
    "few": {"one", "NumPy integer"},
    "number": {*WHOLE, "zero"},
    "draws": {"one", "NumPy integer", "zero"},
    "at least 2": {"NumPy integer"},
    "seed": {*WHOLE, "zero"},
    "positive": {*WHOLE, "half", "fraction", "beyond 64 bits", "huge float"},
    "not negative": {*WHOLE, "zero", "half", "fraction", "beyond 64 bits", "huge float"},
    "size": {"one", "half", "fraction", "NumPy integer"},
    "depth": {"one", "half", "fraction", "NumPy integer"},
    "microns": {"one", "half", "fraction", "NumPy integer", "dictionary"},
    "total count": {*WHOLE, "fraction"},
    "probability": {"zero", "half", "one"},
    "share": {"half", "one"},
    "trust": {"minus one", "zero", "half", "one"},
    "rate": {"zero", "half"},
    "rate above zero": {"half"},
    "truth": {"true", "NumPy false"},
    "prefix": NAMES,
    "text": NAMES,
    "label": NAMES | {"empty text", "blanks"},
    "increasing": {"list of numbers"},
    "increasing, or none": {"list of numbers", "empty list"},
    "counts": {"list of numbers", "list that falls"},
    "keys, or none": {"empty list"},
    "options": {"empty dictionary"},
    "mapping": {"empty dictionary", "dictionary"},
    "directory": {*NAMES},
    "columns": {"list of numbers", "list that falls", "empty list"},
    "devices": {"one", "NumPy integer", "number as text"},
    "logger": {"None", "true", "NumPy false", "empty list"},
    "array": {"array", "nested list"},
    "quantiles": {"empty list"},
    "stage": {"one"},
    "heads": {"one"},
    "width": {"billion"},
    "members": {"NumPy integer", "billion", "zero"},
    "only one": {"one"},
    "only zero": {"zero"},
    "only false": {"NumPy false"},
    "only true": {"true"},
    "zero gpus": {"zero"},
}


class Call(NamedTuple):
    """A public function and how to call it."""

    name: str
    function: Callable[..., Any]
    valid: dict[str, Any]
    """Arguments of a valid call."""
    kinds: dict[str, str]
    """Kind of each parameter."""
    slow: bool = False
    """Whether valid calls take a second or more, so that only a few are made."""


class Objects:
    """Objects that the functions need, and a trained model; each case gets a copy of the object."""

    def __init__(self, training: AnnData, query: AnnData, model: hv.TwoStageVARST, config: hv.ModelConfig) -> None:
        self.model, self.config = model, config
        for adata in (training, query):
            adata.uns.pop("spatial", None)
        self.training, self.query = training, query
        self.prepared = training.copy()
        hv.pp.gene_scales(self.prepared, scales=(1, 4, 10))
        self.predicted = query.copy()
        hv.tl.predict(self.predicted, model, n_samples=2)
        hv.tl.evaluate(self.predicted)
        self.drawn = self.predicted.copy()
        self.drawn.var["symbol"] = self.drawn.var_names
        image = {"hires": np.full((60, 60, 3), 200, np.uint8)}
        factors = {"tissue_hires_scalef": 0.03, "spot_diameter_fullres": 55.0}
        self.drawn.uns["spatial"] = {"S4": {"images": image, "scalefactors": factors}}
        self.gene = model.registry["genes"][0]

    def annotations(self, scratch: Path) -> Path:
        """File with an annotation around all spots, as QuPath exports it."""
        low, high = (f(self.query.obsm["spatial"], axis=0) for f in (np.min, np.max))
        ring = [[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]], [low[0], low[1]]]
        geometry = {"type": "Polygon", "coordinates": [[list(map(float, corner)) for corner in ring]]}
        path = scratch / "annotations.geojson"
        path.write_text(json.dumps({"type": "Feature", "geometry": geometry, "properties": {}}))
        return path


class MeanColour(torch.nn.Module):
    """The smallest encoder."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Mean colours."""
        return images.mean((2, 3))


def slide(path: Path) -> Path:
    """File of a slide with a square of texture, 1 um a pixel."""
    pixels = np.full((1100, 1000, 3), 240, np.uint8)
    texture = gaussian_filter(np.random.default_rng(0).normal(size=(600, 600, 3)), (1.5, 1.5, 0))
    pixels[200:800, 200:800] = np.clip((150, 90, 150) + 150 * texture, 0, 255)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb")
    return path


def shared(**kinds: str) -> dict[str, str]:
    """Kinds of the parameters that most functions share, and of further ones."""
    return {"data": "nothing", "table_name": "?nothing", **kinds}


def calls(objects: Objects, scratch: Path) -> list[Call]:
    """Valid calls of every public function."""
    model, config = objects.model, objects.config
    key, layer, library = {"key": "nothing"}, {"layer": "?nothing"}, {"library_key": "?nothing"}
    keys = {"library_key": "nothing", "spatial_key": "nothing"}
    plot = {"ax": "?nothing", "show": "truth", "save": "?nothing"}
    histology = {"use_rep": EMBEDDING, "library_key": "section"}
    quick = {"max_epochs": 1, "limit_train_batches": 1, "enable_progress_bar": False, "config": config}
    matrix, cube = np.random.default_rng(0).random((6, 3)), np.random.default_rng(0).random((6, 3, 4))
    levels = np.array([0.02, 0.3, 0.7, 0.98])
    both, spread = {"predicted": matrix, "measured": matrix}, {"quantiles": cube, "levels": levels}
    table = hv.metrics.per_gene(matrix, matrix, ["a", "b", "c"])
    genes = {"predicted": "nothing", "measured": "nothing"}
    metrics = [
        *(Call(name, getattr(hv.metrics, name), both, genes) for name in
          ("pearson", "spearman", "r2", "mean_pearson", "relative_variance_distance", "gene_correlation_error",
           "gene_structure_correlation")),
        *(Call(name, getattr(hv.metrics, name), {"values": matrix}, {"values": "array"})
          for name in ("is_constant", "gene_correlation")),
        Call("partial_pearson", hv.metrics.partial_pearson, {**both, "total_counts": np.arange(6)},
             {**genes, "total_counts": "nothing"}),
        Call("per_gene", hv.metrics.per_gene, {**both, "genes": ["a", "b", "c"]},
             {**genes, "genes": "nothing", "total_counts": "?nothing"}),
        Call("summary", hv.metrics.summary, {"scores": table}, {"scores": "nothing"}),
        Call("noise_ceiling", hv.metrics.noise_ceiling, {"counts": np.arange(40).reshape(8, 5), "n_splits": 2},
             {"counts": "array", "genes": "?columns", "n_splits": "few", "log_counts": "truth",
              "random_state": "seed"}),
        Call("crps_samples", hv.metrics.crps_samples, {"samples": cube, "measured": matrix},
             {"samples": "nothing", "measured": "nothing"}),
        Call("crps_quantiles", hv.metrics.crps_quantiles, {**spread, "measured": matrix},
             {"quantiles": "nothing", "levels": "nothing", "measured": "nothing"}),
        Call("crps_normal", hv.metrics.crps_normal, {"mean": matrix, "std": matrix, "measured": matrix},
             {"mean": "nothing", "std": "nothing", "measured": "nothing"}),
        Call("normal_quantiles", hv.metrics.normal_quantiles, {"mean": matrix, "std": matrix, "levels": levels},
             {"mean": "nothing", "std": "nothing", "levels": "nothing"}),
        Call("interval", hv.metrics.interval, {**spread, "share": 0.5},
             {"quantiles": "nothing", "levels": "nothing", "share": "rate above zero"}),
        Call("coverage", hv.metrics.coverage, {"low": matrix, "high": matrix, "measured": matrix},
             {"low": "nothing", "high": "nothing", "measured": "nothing"}),
        Call("pit", hv.metrics.pit, {**spread, "measured": matrix},
             {"quantiles": "nothing", "levels": "nothing", "measured": "nothing", "random_state": "seed"}),
        Call("top_coverage", hv.metrics.top_coverage, {**both, "low": matrix, "high": matrix},
             {**genes, "low": "nothing", "high": "nothing", "top": "share"}),
        Call("morans_i", hv.metrics.morans_i, {"values": matrix, "neighbors": sparse.csr_matrix(np.ones((6, 6)))},
             {"values": "nothing", "neighbors": "nothing"}),
        Call("moran_agreement", hv.metrics.moran_agreement, {**both, "neighbors": sparse.csr_matrix(np.ones((6, 6)))},
             {**genes, "neighbors": "nothing"}),
        Call("bootstrap_interval", hv.metrics.bootstrap_interval,
             {"scores": pd.DataFrame(matrix[:3]), "clusters": ["a", "a", "b"]},
             {"scores": "nothing", "clusters": "nothing", "confidence_level": "rate", "n_resamples": "few",
              "random_state": "seed"}),
        Call("describe", hv.metrics.describe, {}, {}),
        Call("sample_quantiles", hv.metrics.sample_quantiles, {"samples": cube}, {"samples": "nothing"}),
    ]  # fmt: skip
    slides = scratch / "slides"
    (slides / "st").mkdir(parents=True, exist_ok=True)
    objects.query.write_h5ad(slides / "st" / "A.h5ad")
    ridge = hv.tl.baseline(objects.training.copy(), "ridge", **histology)
    fields = {
        **dict.fromkeys(("codebook_size", "codebook_dim", "n_pcs", "n_layers", "feedforward", "prior_hidden"), "count"),
        **dict.fromkeys(("n_covariates", "attention_limit"), "number"),
        **dict.fromkeys(("dropout", "prior_dropout", "prior_input_dropout"), "rate"),
        **dict.fromkeys(("hierarchical_weight", "vq_weight", "commitment_weight"), "not negative"),
        **dict.fromkeys(("outline", "coordinates"), "truth"),
        **dict.fromkeys(("codebook_update", "condition", "standardize", "order", "style"), "nothing"),
        **dict.fromkeys(("n_genes", "scales", "components", "encoder_hidden"), "nothing"),
        **{
            "dead_code_threshold": "not negative",
            "codebook_decay": "rate above zero",
            "residual": "only true",
            "n_heads": "heads",
        },
        **{"embedding_dims": "columns", "n_neighbors": "increasing, or none", "width": "width", "n_members": "members"},
    }
    training_options = {
        **dict.fromkeys(("batch_size", "patience"), "count"),
        **dict.fromkeys(("max_epochs", "limit_train_batches"), "?count"),
        **dict.fromkeys(("learning_rate", "gradient_clip_val"), "positive"),
        **dict.fromkeys(("strategy", "accelerator"), "nothing"),
        **{"precision": "?nothing", "num_nodes": "few"},
        **{"weight_decay": "not negative", "warmup_steps": "number", "averaging_decay": "rate"},
        **{"devices": "devices", "logger": "logger", "callbacks": "keys, or none", "random_state": "seed"},
        **{"enable_progress_bar": "truth", "checkpoint_dir": "?directory", "resume_from": "?nothing"},
    }
    return [
        Call("pp.gene_panel", hv.pp.gene_panel, {"data": objects.training, "n_genes": 10},
             shared(n_genes="at least 2", flavor="nothing", min_fraction="rate", **library, key_added="prefix",
                    copy="truth")),
        Call("pp.gene_scales", hv.pp.gene_scales, {"data": objects.prepared},
             shared(scales="increasing, or none", gene_sets="?nothing", **layer, key_added="nothing",
                    random_state="seed", copy="truth")),
        Call("pp.tile", hv.pp.tile, {"slide": slide(scratch / "tissue.tif"), "mpp": 1.0},
             {"slide": "nothing", "spacing_um": "?nothing", "mpp": "size", "section": "?prefix", "min_tissue": "share",
              "thumbnail_px": "count", "tile_key": "prefix"}, slow=True),
        Call("pp.embed", hv.pp.embed,
             {"data": objects.drawn, "encoder": MeanColour(), "mpp": 1.0, "field_um": 900.0,
              "show_progress_bar": False},
             shared(encoder="nothing", image="?nothing", field_um="nothing", mpp="microns", library_key="?nothing",
                    spatial_key="nothing", weights="?nothing", key_added="?prefix", batch_size="count",
                    device="nothing", precision="nothing", show_progress_bar="truth", copy="truth")),
        Call("encoders.get", hv.encoders.get, {"name": "uni"}, {"name": "nothing"}),
        Call("encoders.describe", hv.encoders.describe, {}, {}),
        Call("encoders.Encoder", hv.encoders.get("uni").replace, {},
             {"name": "prefix", "architecture": "prefix", "options": "mapping", "mean": "nothing", "std": "nothing",
              "layers": "counts", "pooling": "nothing", "input_px": "count", "token_width": "number", "gated": "truth",
              "module": "?nothing"}),
        Call("pp.niche", hv.pp.niche, {"data": objects.query, **histology},
             shared(use_rep="nothing", n_neighbors="increasing", **{**keys, "library_key": "?nothing"},
                    key_added="prefix", copy="truth")),
        Call("tl.tokenize", hv.tl.tokenize, {"data": objects.query, "model": model},
             shared(model="nothing", **layer, key_added="prefix", batch_size="count", device="nothing", copy="truth")),
        Call("tl.predict", hv.tl.predict, {"data": objects.query, "model": model},
             shared(model="nothing", use_rep="?nothing", library_key="?nothing", spatial_key="?nothing",
                    units="?nothing", depth="?total count", decoding="nothing", n_samples="draws",
                    quantiles="quantiles", tokens="truth", temperature="only one", top_k="only zero", top_p="only one",
                    key_added="prefix", batch_size="count", device="nothing", precision="nothing",
                    random_state="seed", show_progress_bar="truth", copy="truth")),
        Call("tl.predict, drawing", hv.tl.predict, {"data": objects.query, "model": model, "n_samples": 2},
             {"temperature": "positive", "top_k": "number", "top_p": "share"}),
        Call("tl.calibrate", hv.tl.calibrate, {"data": objects.query, "model": model},
             shared(group_key="?nothing",
                    model="nothing", **library, key_added="prefix", batch_size="count", device="nothing",
                    random_state="seed", show_progress_bar="truth")),
        Call("tl.adapt", hv.tl.adapt, {"data": objects.query, "model": model},
             shared(measured_key="?nothing", model="nothing", **library, key_added="prefix", batch_size="count",
                    device="nothing", random_state="seed", show_progress_bar="truth")),
        Call("tl.baseline", hv.tl.baseline, {"data": objects.training, "method": "mlp", **histology},
             shared(method="nothing", use_rep="nothing", **{**keys, "library_key": "?nothing"}, **layer,
                    group_key="?nothing",
                    standardize="nothing", key_added="prefix", random_state="?seed"), slow=True),
        Call("tl.baseline, ridge_hest", hv.tl.baseline, {"data": objects.training, "method": "ridge_hest", **histology},
             {"random_state": "?nothing"}),
        Call("Baseline.predict", ridge.predict, {"data": objects.query}, shared(key_added="?prefix", copy="truth")),
        Call("tl.evaluate", hv.tl.evaluate, {"data": objects.predicted},
             shared(**key, **layer, **library, group_key="?nothing", random_state="seed")),
        Call("tl.train_stage1", hv.tl.train_stage1, {"data": objects.prepared, **quick},
             shared(group_key="?nothing",
                    **layer, **library, config="?nothing", key_added="prefix", random_state="seed"), slow=True),
        Call("tl.train_stage2", hv.tl.train_stage2, {"data": objects.prepared, "model": model, **histology, **quick},
             shared(group_key="?nothing",
                    model="nothing", use_rep="nothing", **{**keys, "library_key": "?nothing"},
                    covariates="keys, or none", config="?nothing", key_added="prefix", random_state="seed"), slow=True),
        Call("tl.train", hv.tl.train, {"data": objects.prepared, **histology, **quick},
             shared(group_key="?nothing",
                    use_rep="nothing", **layer, **{**keys, "library_key": "?nothing"}, covariates="keys, or none",
                    config="?nothing", key_added="prefix", random_state="seed", stage1="?options", stage2="?options",
                    checkpoint_dir="?directory", resume="only false"), slow=True),
        Call("TrainingOptions", lambda **options: TrainingOptions.checked(options), {"accelerator": "cpu"},
             training_options),
        Call("get.prediction", hv.get.prediction, {"data": objects.predicted}, shared(**key, min_trust="?trust")),
        Call("get.genes", hv.get.genes, {"model": model}, {"model": "nothing"}),
        Call("get.spatialdata", hv.get.spatialdata, {"data": objects.predicted},
             shared(**key, **library, confidence_level="rate above zero")),
        Call("io.write_geojson", hv.io.write_geojson,
             {"data": objects.predicted, "path": scratch / "out.geojson", "genes": objects.gene},
             shared(**key, **library, path="nothing", genes="?nothing", section="?nothing", shape="nothing",
                    confidence_level="rate above zero", diameter="?positive")),
        Call("io.read_geojson", hv.io.read_geojson, {"data": objects.query, "path": objects.annotations(scratch)},
             shared(**library, path="nothing", key_added="prefix", section="?nothing", spatial_key="nothing",
                    copy="truth")),
        Call("io.LazySlideModel", hv.io.LazySlideModel, {"model": model}, {"model": "nothing", "mpp": "?positive"}),
        Call("pl.report", hv.pl.report,
             {"data": objects.drawn, "path": scratch / "report.html", "genes": objects.gene},
             shared(**key, **library, **layer, path="nothing", model="?nothing", genes="?nothing", title="text",
                    confidence_level="rate above zero", gene_symbols="?nothing"), slow=True),
        Call("pl.spatial", hv.pl.spatial, {"data": objects.drawn, "genes": objects.gene},
             shared(genes="nothing", **key, section="?nothing", **library, **layer, cmap="nothing", std_cmap="nothing",
                    size="size", img_alpha="probability", gene_symbols="?nothing", **plot)),
        Call("pl.calibration", hv.pl.calibration, {"data": objects.predicted}, shared(**key, **layer, **plot)),
        Call("pl.gene_correlation", hv.pl.gene_correlation, {"data": objects.predicted},
             shared(**key, **layer, **plot)),
        Call("pl.metrics", hv.pl.metrics, {"data": objects.predicted},
             shared(**key, score="nothing", n_labels="number", gene_symbols="?nothing", **plot)),
        Call("pl.codebook", hv.pl.codebook, {"model": model}, {"model": "nothing", **plot}),
        Call("pl.trust", hv.pl.trust, {"model": model, "data": objects.drawn, "gene_symbols": "symbol"},
             shared(model="nothing", n_labels="number", gene_symbols="nothing", **plot)),
        Call("pl.training", hv.pl.training, {"model": model}, {"model": "nothing", **plot}),
        Call("datasets.simulate", hv.datasets.simulate, {"n_sections": 1, "n_spots": 9, "n_genes": 5},
             {"n_sections": "few", **dict.fromkeys(("n_spots", "n_genes", "n_programs"), "at least 2"),
              "embedding_dim": "few", "depth": "depth", "random_state": "seed"}),
        Call("datasets.hest", hv.datasets.hest, {"path": slides, "embedding": None},
             {"path": "nothing", "dataset": "?nothing", "embedding": "?nothing", "slides": "?nothing"}),
        Call("ModelConfig", config.replace, {}, fields),
        Call("TwoStageVARST.load", hv.TwoStageVARST.load, {"path": scratch / "first"}, {"path": "nothing"}),
        Call("TwoStageVARST.load_stage", model.load_stage, {"path": scratch / "first", "stage": 1},
             {"path": "nothing", "stage": "stage"}),
        Call("TwoStageVARST.describe", deepcopy(model).describe, {},
             {"tissue": "?label", "species": "?label", "licence": "?label"}),
        Call("TwoStageVARST.save", model.save, {"path": scratch / "saved"}, {"path": "directory"}),
        Call("TwoStageVARST.push", model.push, {"repository": "no owner, no name"},
             {"repository": "nothing", "private": "nothing"}),
        Call("TwoStageVARST.save_stage", model.save_stage, {"path": scratch / "saved", "stage": 1},
             {"path": "directory", "stage": "stage"}),
        *(call._replace(name=f"metrics.{call.name}") for call in metrics),
    ]  # fmt: skip


def digest(value: Any) -> str:
    """Digest of an object's contents, independent of how they are stored."""
    if isinstance(value, AnnData):
        slots = (value.obs, value.var, value.obsm, value.varm, value.layers, value.uns, value.X, value.obsp)
        return digest([dict(s) if isinstance(s, Mapping) and not isinstance(s, pd.DataFrame) else s for s in slots])
    if sparse.issparse(value):
        value = value.toarray()
    if isinstance(value, pd.DataFrame):
        value = [list(value.columns), value.index.to_numpy(), *(value[c].to_numpy() for c in value)]
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        return f"{value.dtype}{value.shape}{hashlib.blake2b(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return str({str(k): digest(v) for k, v in value.items()})
    if isinstance(value, list | tuple | np.ndarray):
        return str([digest(v) for v in value])
    return repr(value)


def model_digest(model: hv.TwoStageVARST | None) -> str:
    """Digest of a model: weights, what it was trained on, where it is."""
    if model is None:
        return ""
    weights = {name: float(tensor.double().sum()) for name, tensor in model.state_dict().items()}
    return str((weights, model.registry, model.training, model.device, model.config))


def judge(error: BaseException, names: tuple[str, ...]) -> str:
    """Whether an error is a refusal: raised by histovar, in one line with one of these names."""
    frames = traceback.extract_tb(error.__traceback__)
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if not frames or not frames[-1].filename.startswith(PACKAGE):
        where = f"{frames[-1].filename.split('site-packages/')[-1]}:{frames[-1].lineno}" if frames else ""
        return f"traceback: {type(error).__name__} of {where}: {text[:150]!r}"
    if not isinstance(error, (TypeError, ValueError, KeyError, OSError, FloatingPointError)):
        return f"traceback: {type(error).__name__}: {text[:150]}"
    if "\n" in text or not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names):
        return f"traceback: no line that names {names[0]}: {text[:150]!r}"
    return "refused"


def attempt(
    call: Call, changes: dict[str, Any], names: tuple[str, ...], model: hv.TwoStageVARST
) -> tuple[str, Any, AnnData | None]:
    """Call a function; return the outcome, what it returned and the object that it was given."""
    arguments = {**call.valid, **changes}
    data = arguments.get("data")
    if isinstance(data, AnnData) and "data" not in changes:
        arguments["data"] = data = data.copy()
    watched = model if "model" in call.kinds or "path" in call.kinds else None
    before = digest(data), model_digest(watched)
    try:
        result = call.function(**arguments)
    except Exception as error:  # noqa: BLE001
        outcome = judge(error, names)
        after = digest(data), model_digest(watched)
        if before != after:
            outcome = (
                f"changed: {'model' if before[0] == after[0] else 'data'}, by a call that was not done ({outcome})"
            )
        elif plt.get_fignums():
            outcome = f"changed: a figure is left open ({outcome})"
        return outcome, None, None
    finally:
        plt.close("all")
    return "whole", result, data if isinstance(data, AnnData) else None


def wrong_arguments(
    objects: Objects, scratch: Path, share: float, rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """Give every value to every parameter of every public function."""
    for call in calls(objects, scratch):
        module = call.name.split(".")[0].split(",")[0]
        known = inspect.signature(call.function).parameters
        untried = [name for name in known if name not in call.kinds and name not in ("options", "changes")]
        if untried and "," not in call.name:
            yield f"arguments of {module}", f"not tried: {untried} of {call.name}"
        for name, kind in call.kinds.items():
            valid = KINDS[kind.removeprefix("?")] | ({"None"} if kind.startswith("?") else set())
            for label, value in VALUES.items():
                is_valid = label in valid
                if rng.random() >= share or (is_valid and call.slow and rng.random() >= SLOW_SHARE):
                    continue
                if is_valid and "model" in call.valid:
                    call = call._replace(valid={**call.valid, "model": deepcopy(objects.model)})
                # Nothing is pushed: what is right otherwise is refused for its repository.
                named = (name, "repository") if call.name == "TwoStageVARST.push" else (name,)
                outcome, _, _ = attempt(call, {name: value}, named, objects.model)
                if is_valid != (outcome == "whole") and outcome in ("whole", "refused"):
                    outcome = "refused, but valid" if is_valid else "accepted"
                good = outcome in ("whole", "refused")
                yield f"arguments of {module}", outcome if good else f"{outcome}: {call.name}({name}={label})"
        unknown = attempt(call, {"no_such_argument": 1}, ("no_such_argument",), objects.model)[0]
        yield f"arguments of {module}", "accepted" if unknown == "whole" else unknown


EMPTY = ("empty text", "blanks")
# Of each command, what a right call of it has, and kinds of its options.
COMMANDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "train": (
        ["training.h5ad", "--out", "new"],
        {
            **dict.fromkeys(("--epochs", "--batch-size"), "count"),
            **dict.fromkeys(("--devices", "--num-nodes"), "few"),
            **dict.fromkeys(("--model", "--preset", "--use-rep", "--covariate", "--hold-out", "--dataset"), "nothing"),
            **dict.fromkeys(("--layer", "--library-key", "--spatial-key", "--stage1-ckpt", "--strategy"), "nothing"),
            **{"--key-added": "prefix", "--seed": "seed", "--n-genes": "at least 2", "--out": "directory"},
            **{"--training-stage": "stage", "--gpus": "zero gpus", "--checkpoint-dir": "directory"},
        },
    ),
    "predict": (
        ["query.h5ad", "--model", "first", "--out", "new.h5ad"],
        {
            **dict.fromkeys(("--use-rep", "--library-key", "--spatial-key", "--scheduler", "--model"), "nothing"),
            **dict.fromkeys(("--decoding", "--precision", "--out"), "nothing"),
            **{"--n-samples": "draws", "--quantile": "probability", "--temperature": "only one", "--top-p": "only one"},
            **{"--top-k": "only zero", "--batch-size": "count", "--seed": "seed", "--gpus": "zero gpus"},
            **{"--key-added": "prefix", "--units": "nothing", "--depth": "total count"},
        },
    ),
    "calibrate": (
        ["query.h5ad", "--model", "first", "--out", "new"],
        {
            **{"--model": "nothing", "--library-key": "nothing", "--key-added": "prefix", "--batch-size": "count"},
            **{"--seed": "seed", "--gpus": "zero gpus", "--out": "directory"},
        },
    ),
    "adapt": (
        ["query.h5ad", "--model", "first", "--out", "new"],
        {
            **{"--model": "nothing", "--measured-key": "nothing", "--library-key": "nothing", "--key-added": "prefix"},
            **{"--batch-size": "count", "--seed": "seed", "--gpus": "zero gpus", "--out": "directory"},
        },
    ),
    "evaluate": (
        ["predicted.h5ad"],
        {
            **dict.fromkeys(("--library-key", "--group-key", "--key", "--layer", "--out"), "nothing"),
            **{"--seed": "seed"},
        },
    ),
    "tile": (
        ["tissue.tif", "--mpp", "1", "--out", "new.h5ad"],
        {
            **{"--spacing-um": "nothing", "--mpp": "size", "--section": "directory", "--min-tissue": "share"},
            **{"--out": "nothing"},
        },
    ),
    "embed": (
        ["query.h5ad", "--image", "tissue.tif", "--mpp", "1", "--out", "new.h5ad"],
        {
            **dict.fromkeys(("--encoder", "--library-key", "--spatial-key", "--precision", "--out"), "nothing"),
            **{"--image": "nothing", "--field-um": "positive", "--mpp": "positive", "--weights": "directory"},
            **{"--batch-size": "count", "--gpus": "zero gpus"},
        },
    ),
    "report": (
        ["predicted.h5ad", "--out", "new.html"],
        {
            **dict.fromkeys(("--model", "--library-key", "--key", "--layer", "--gene", "--out"), "nothing"),
            **{"--gene-symbols": "nothing", "--title": "prefix", "--confidence-level": "rate above zero"},
        },
    ),
    "export": (
        ["predicted.h5ad", "--to", "geojson", "--out", "new.geojson"],
        {
            **dict.fromkeys(("--to", "--section", "--shape", "--library-key", "--key", "--gene", "--out"), "nothing"),
            **{"--diameter": "positive", "--confidence-level": "rate above zero"},
        },
    ),
    "demo": (["--out", "new"], {"--n-spots": "nothing", "--seed": "seed", "--out": "directory"}),
    "describe": (["first"], {"model": "nothing"}),  # its options take any text
    "info": (["first"], {"model": "nothing", "--out": "nothing"}),
}
# Values as they are typed, by the names of those of Python.
TYPED = {
    "empty text": "",
    "blanks": "  ",
    "text": "no-such",
    "minus one": "-1",
    "zero": "0",
    "one": "1",
    "NumPy integer": "3",
    "half": "0.5",
    "fraction": "1.5",
    "NaN": "nan",
    "infinity": "inf",
    "billion": "1000000000",
    "beyond 64 bits": str(10**30),
    "huge float": "1e300",
    "list of numbers": "[1, 2]",
}


def wrong_commands(
    objects: Objects, scratch: Path, share: float, rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """Give wrong values to every option of every command; valid ones take long, and are left to the tests."""
    folder = scratch / "commands"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copytree(scratch / "first", folder / "first")
    for name in ("training", "query", "predicted"):
        getattr(objects, name).write_h5ad(folder / f"{name}.h5ad")
    slide(folder / "tissue.tif")
    files = sorted(folder.rglob("*"))
    with contextlib.chdir(folder):
        for command, (right, kinds) in COMMANDS.items():
            for option, kind in kinds.items():
                for label, typed in TYPED.items():
                    is_valid = label in KINDS[kind] or (kind in ("directory", "prefix") and label not in EMPTY)
                    if is_valid or rng.random() >= share:
                        continue
                    given = [typed] if option == "model" else [*right, option, typed]
                    outcome = refusal([command, *given], option, typed)
                    if (present := sorted(folder.rglob("*"))) != files:
                        outcome, files = "changed: files are not as they were", present
                    good = outcome == "refused"
                    yield "arguments of commands", outcome if good else f"{outcome}: {command} {option} {typed!r}"


def refusal(arguments: list[str], option: str, typed: str) -> str:
    """Outcome of a command that is run in this process."""
    package = logging.getLogger("histovar")
    handlers, level = list(package.handlers), package.level
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with mock.patch.object(sys, "argv", ["histovar", *arguments]):
                command_line()
        return "accepted"
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:  # noqa: BLE001
        return f"traceback: {error!r}"
    finally:
        package.handlers[:] = handlers
        package.setLevel(level)
    if code == 0:
        return "accepted"
    lines = [line for line in err.getvalue().splitlines() if line.startswith("histovar: ")]
    names = (option, option.lstrip("-").replace("-", "_"), *([typed] if typed.strip() else []))
    if code != 2 or len(lines) != 1 or "Traceback" in err.getvalue() or not any(name in lines[0] for name in names):
        return f"traceback: code {code}: {err.getvalue()[-150:]!r}"
    return "refused"
