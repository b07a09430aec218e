"""Broken and unusual objects, given to every public function: the right result or one line, and nothing changed.

Part "objects" of ``benchmarks/faults.py``; outcomes are named as in ``fault_parts/arguments.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

import histovar as hv

from .arguments import EMBEDDING, SLOW_SHARE, Call, Objects, attempt, calls, digest


class Breakage(NamedTuple):
    """A change that breaks an object, and what must come of it."""

    change: Callable[[AnnData], Any]
    slots: tuple[str, ...]
    """Names of which a refusal must contain one."""
    refused_by: tuple[str, ...] = ()
    """Functions that need what is broken, and must refuse the object."""
    harmless: bool = False
    """Whether every function must accept the object."""


PLACED = ("pp.niche", "tl.predict", "tl.calibrate", "tl.adapt", "tl.baseline", "tl.train", "tl.train_stage2")
EMBEDDED = (*PLACED, "Baseline.predict")
TRAINING = ("tl.train", "tl.train_stage1", "tl.train_stage2")
COUNTED = ("pp.gene_panel", "tl.tokenize", "tl.calibrate", "tl.adapt", "tl.baseline")
PANELLED = ("pp.gene_scales", "tl.train", "tl.train_stage1", "tl.baseline")
RECORDED = ("pp.gene_panel", "pp.gene_scales", "pp.niche", "tl.tokenize", "tl.predict", "tl.evaluate", "get.prediction",
            "pl.spatial", "pl.calibration", "pl.gene_correlation")  # fmt: skip
NEEDED = ("histovar", "histovar_std")
PREDICTED = ("tl.evaluate", "get.prediction", "pl.spatial", "pl.calibration", "pl.gene_correlation")


def put(store: str, name: str, make: Callable[[Any], Any]) -> Callable[[AnnData], None]:
    """Replace what a slot holds by a function of it; do nothing where there is no such slot."""

    def change(adata: AnnData) -> None:
        slot = getattr(adata, store)
        if name in slot:
            slot[name] = make(slot[name])

    return change


def entry(name: str, value: Any) -> Callable[[AnnData], None]:
    """Replace an entry of histovar's record in ``uns``; do nothing where there is none."""
    return lambda adata: adata.uns.get("histovar", {}).update(
        {name: value} if name in adata.uns.get("histovar", ()) else {}
    )


def with_counts(make: Callable[[np.ndarray], Any]) -> Callable[[AnnData], None]:
    """Replace X, and drop the log-normalised layer so that it is computed again."""

    def change(adata: AnnData) -> None:
        for name in [name for name in adata.layers if name == "lognorm"]:
            del adata.layers[name]
        adata.uns.get("histovar", {}).pop("lognorm", None)
        adata.X = make(adata.X.toarray())

    return change


def first(value: Any) -> Callable[[Any], Any]:
    """Set the first number of an array."""

    def change(array: Any) -> Any:
        array = np.array(array.toarray() if sparse.issparse(array) else array, dtype=np.float64)
        array.flat[0] = value
        return array

    return change


def text_table(adata: AnnData, name: str) -> None:
    if name in adata.obsm:
        adata.obsm[name] = pd.DataFrame(np.full(adata.obsm[name].shape, "a"), index=adata.obs_names)


def rename(adata: AnnData, axis: str) -> None:
    names = list(getattr(adata, f"{axis}_names"))
    setattr(adata, f"{axis}_names", [names[0], *names[:-1]])


def breakages() -> dict[str, Breakage]:
    """Broken and unusual objects, by name."""
    xy, rep, panel, record = "spatial", EMBEDDING, "histovar_panel", "histovar"
    found = {}
    for where, name, users in (("coordinates", xy, PLACED + ("pl.spatial",)), ("embedding", rep, EMBEDDED)):
        slots = (name,)
        found |= {
            f"{where}: text": Breakage(put("obsm", name, lambda x: np.full(x.shape, "a")), slots, users),
            f"{where}: numbers as text": Breakage(put("obsm", name, lambda x: x.astype(str)), slots, users),
            f"{where}: objects": Breakage(put("obsm", name, lambda x: np.full(x.shape, None)), slots, users),
            f"{where}: complex": Breakage(put("obsm", name, lambda x: x + 1j), slots, users),
            f"{where}: NaN": Breakage(put("obsm", name, first(np.nan)), slots, users),
            f"{where}: infinite": Breakage(put("obsm", name, first(np.inf)), slots, users),
            f"{where}: 1e300": Breakage(put("obsm", name, first(1e300)), slots, users),
            f"{where}: one axis": Breakage(put("obsm", name, lambda x: x[:, 0]), slots, users if name == xy else ()),
            f"{where}: three axes": Breakage(put("obsm", name, lambda x: x[:, :, None]), slots, users),
            f"{where}: no columns": Breakage(put("obsm", name, lambda x: x[:, :0]), slots, users),
            f"{where}: a table of text": Breakage(lambda a, name=name: text_table(a, name), slots, users),
            f"{where}: missing": Breakage(lambda a, name=name: a.obsm.pop(name, None), slots, users),
            f"{where}: sparse": Breakage(put("obsm", name, sparse.csr_matrix), slots, harmless=True),
            f"{where}: Fortran order": Breakage(put("obsm", name, np.asfortranarray), slots, harmless=True),
            f"{where}: masked": Breakage(put("obsm", name, lambda x: np.ma.masked_less(x, x.max())), slots, users),
        }
    for label, value in (
        ("a list", [1, 2]),
        ("text", "text"),
        ("a number", 5),
        ("None", None),
        ("a table", pd.DataFrame({"a": [1]})),
    ):
        found[f"uns['histovar']: {label}"] = Breakage(lambda a, v=value: a.uns.update({record: v}), (record,), RECORDED)
    for name in (
        "params",
        "genes",
        "units",
        "layer",
        "quantiles",
        "normalization",
        "identity",
        "slots",
        "niche",
        "panel",
        "scales",
        "lognorm",
        "observation",
        "version",
        "trained_on",
    ):
        for label, value in (
            ("text", "text"),
            ("None", None),
            ("a number", 5),
            ("a list", [None]),
            ("an empty dictionary", {}),
        ):
            found[f"uns['histovar'][{name!r}]: {label}"] = Breakage(entry(name, value), (record, name))
    for label, make, users in (
        ("text", lambda x: np.where(x, "yes", "no"), PANELLED),
        ("NaN", lambda x: np.where(x, 1.0, np.nan), PANELLED),
        ("all False", lambda x: np.zeros(len(x), bool), PANELLED),
        ("categories", lambda x: pd.Categorical(np.where(x, "yes", "no")), PANELLED),
        ("numbers", lambda x: np.asarray(x, int), PANELLED),
        ("nullable", lambda x: pd.array(x, dtype="boolean"), ()),
        ("missing values", lambda x: pd.array([None, *x[1:]], dtype="boolean"), PANELLED),
    ):
        found[f"panel: {label}"] = Breakage(put("var", panel, make), (panel,), users)
    for label, make in (
        ("NaN", first(np.nan)),
        ("below -1", lambda x: x - 5),
        ("all -1", lambda x: np.full_like(x, -1)),
        ("one column", lambda x: x[:, :1]),
        ("text", lambda x: x.astype(str)),
        ("huge", lambda x: x * 10**6),
    ):
        found[f"gene scales: {label}"] = Breakage(put("varm", "histovar_scales", make), ("histovar_scales", "scales"))
    counts = ("X", "lognorm", "adata")
    for label, make in (
        ("negative", first(-1)),
        ("fractions", lambda x: x + 0.5),
        ("NaN", first(np.nan)),
        ("infinite", first(np.inf)),
        ("complex", lambda x: x + 1j),
    ):
        found[f"counts: {label}"] = Breakage(with_counts(make), counts, COUNTED)
    found["counts: zero"] = Breakage(with_counts(np.zeros_like), (*counts, "n_genes"))
    found["counts: gone"] = Breakage(lambda a: (with_counts(np.asarray)(a), setattr(a, "X", None)), counts, COUNTED)
    for label, make in (
        ("negative", first(-1)),
        ("NaN", first(np.nan)),
        ("1e300", first(1e300)),
        ("huge", first(1e30)),
    ):
        found[f"lognorm: {label}"] = Breakage(put("layers", "lognorm", make), ("lognorm",))
    found |= {
        "sections: missing values": Breakage(put("obs", "section", lambda x: [None, *x[1:]]), ("section",), PLACED),
        "sections: missing": Breakage(
            lambda a: a.obs.pop("section"), ("section", "library_key"), ("pp.niche", "tl.baseline")
        ),
        "sections: each its own": Breakage(
            put("obs", "section", lambda x: range(len(x))), ("section", "n_neighbors", "sections")
        ),
        "genes of one name": Breakage(lambda a: rename(a, "var"), ("var_names",), (*RECORDED, *PLACED)),
        "spots of one name": Breakage(lambda a: rename(a, "obs"), ("obs_names",), (*RECORDED, *PLACED)),
        "scores: text": Breakage(
            put("var", "histovar_pearson", lambda x: x.astype(str)), ("histovar_pearson",), ("pl.metrics",)
        ),
        "scores: some missing": Breakage(
            lambda a: a.var.pop("histovar_mse") if "histovar_mse" in a.var else None, ("histovar_mse",)
        ),
        "no image entry": Breakage(lambda a: a.uns.update(spatial={}), (xy,), harmless=True),
    }
    for name in ("histovar", "histovar_std", "histovar_samples", "histovar_rates", "histovar_spots"):
        for label, make in (
            ("text", lambda x: np.full(x.shape, "a")),
            ("one axis", lambda x: x.reshape(len(x), -1)[:, 0]),
            ("too few columns", lambda x: x[:, :2]),
            ("infinite", first(np.inf)),
        ):
            found[f"prediction {name}: {label}"] = Breakage(put("obsm", name, make), (name, "samples"))
        found[f"prediction {name}: missing"] = Breakage(
            lambda a, name=name: a.obsm.pop(name, None), (name,), PREDICTED if name in NEEDED else ()
        )
    pixels, factor = np.zeros((9, 9, 3)), "tissue_hires_scalef"
    images: dict[str, Any] = {
        "None": None, "text": "text", "a list": [1], "an empty entry": {"S4": {}}, "an entry of None": {"S4": None},
        "scale factors that are None": {"S4": {"images": {"hires": pixels}, "scalefactors": None}},
        "scale factors that are text": {"S4": {"images": {"hires": pixels}, "scalefactors": {factor: "1"}}},
        "an image that is text": {"S4": {"images": {"hires": "text"}, "scalefactors": {factor: 1.0}}},
    }  # fmt: skip
    for label, value in images.items():
        found[f"uns['spatial']: {label}"] = Breakage(lambda a, v=value: a.uns.update(spatial=v), (xy,), harmless=True)
    return found


def broken_objects(
    objects: Objects, scratch: Path, share: float, rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """Give broken objects to every function that takes an object."""
    every = [
        call for call in calls(objects, scratch) if isinstance(call.valid.get("data"), AnnData) and "," not in call.name
    ]
    for label, breakage in breakages().items():
        for call in every:
            must_fail = call.name in breakage.refused_by
            if rng.random() >= share or (call.slow and not must_fail and rng.random() >= SLOW_SHARE):
                continue
            adata = call.valid["data"].copy()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                breakage.change(adata)
            own = call._replace(valid={**call.valid, "data": adata})
            if "model" in call.valid:
                own.valid["model"] = deepcopy(objects.model)
            outcome, result, written = attempt(own, {}, breakage.slots, own.valid.get("model", objects.model))
            if outcome == "whole" and (must_fail or not is_finite(call, written)):
                outcome = "accepted"
            # Embedding needs the image that plots do without.
            if outcome == "refused" and breakage.harmless and call.name != "pp.embed":
                outcome = "refused, but valid"
            good = outcome in ("whole", "refused")
            yield "broken objects", outcome if good else f"{outcome}: {call.name}, {label}"


def is_finite(call: Call, adata: AnnData | None) -> bool:
    """Whether all values of the prediction that a call has written are finite; true for calls that write none."""
    key = {"tl.predict": "histovar", "Baseline.predict": "ridge"}.get(call.name)
    return key is None or adata is None or bool(np.isfinite(adata.obsm[key]).all())


def views(objects: Objects, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Check that views of an object, with spots in any order, give what copies of them give."""
    n_spots = objects.query.n_obs
    for label, rows in (
        ("reversed", slice(None, None, -1)),
        ("every second", slice(None, None, 2)),
        ("shuffled", rng.permutation(n_spots)),
        ("by truth", np.arange(n_spots) % 3 > 0),
    ):
        for name, function in (("tl.predict", hv.tl.predict), ("tl.tokenize", hv.tl.tokenize)):
            try:
                view, copy = objects.query[rows], objects.query[rows].copy()
                function(view, objects.model)
                function(copy, objects.model)
                yield "views", "whole" if digest(view) == digest(copy) else f"changed: {name} of a view, {label}"
            except Exception as error:  # noqa: BLE001
                yield "views", f"traceback: {error!r}: {name} of a view, {label}"
