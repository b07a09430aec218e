"""Bad input is refused with a helpful message, and the object stays as it was whatever fails."""

import sys
from collections.abc import Mapping
from itertools import count

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from scipy import sparse

import histovar as hv
from histovar.anndata_io import slots

from .conftest import QUICK, small_config


def snapshot(adata):
    slots = {"layers": adata.layers, "obsm": adata.obsm, "varm": adata.varm, "uns": adata.uns}
    keys = {name: sorted(key for key in slot if key is not None) for name, slot in slots.items()}  # None is X
    return keys, list(adata.obs.columns), list(adata.var.columns), adata.X.sum()


def refuse(adata, call, error, message):
    before = snapshot(adata)
    with pytest.raises(error, match=message):
        call(adata)
    assert str(snapshot(adata)) == str(before)


def with_obsm(value):
    def change(adata):
        adata.obsm["X_histology"] = value(adata.obsm["X_histology"].copy())

    return change


def put(array, row, value):
    array[row] = value
    return array


def drop_embedding(adata):
    del adata.obsm["X_histology"]


def drop_place(adata):
    del adata.obsm["spatial"]


def no_place_in_row(adata):
    adata.obsm["spatial"][3, 0] = np.nan


def drop_section(adata):
    del adata.obs["section"]


def missing_section(adata):
    adata.obs.loc[adata.obs_names[0], "section"] = None


def repeat_gene(adata):
    adata.var_names = ["GENE1", *adata.var_names[:-1]]


def repeat_spot(adata):
    adata.obs_names = ["S", "S", *adata.obs_names[2:]]


def small_section(adata):
    adata.obs["section"] = pd.Categorical(["tiny"] * 4 + ["rest"] * (adata.n_obs - 4))


HISTOLOGY = [
    (drop_embedding, KeyError, "use_rep: no 'X_histology' in obsm"),
    (with_obsm(lambda x: put(x, 2, np.nan)), ValueError, "NaN or infinite values in 1 rows, first at row 2"),
    (with_obsm(lambda x: put(x, 0, np.inf)), ValueError, "NaN or infinite"),
    (with_obsm(lambda x: x.astype(str)), ValueError, "expected numbers"),
    (drop_place, KeyError, "spatial_key: no 'spatial' in obsm"),
    (no_place_in_row, ValueError, "spatial_key.*NaN or infinite"),
    (missing_section, ValueError, "library_key: 1 spots have no value"),
    (
        repeat_gene,
        ValueError,
        r"var_names: duplicated names such as \['GENE1'\]; call adata.var_names_make_unique",
    ),
    (repeat_spot, ValueError, "obs_names: duplicated names"),
    (small_section, ValueError, "n_neighbors: section 'tiny' has 4 spots"),
]


@pytest.mark.parametrize(("change", "error", "message"), HISTOLOGY)
def test_training_refuses_histology(prepared, loaded, change, error, message):
    adata = prepared.copy()
    change(adata)
    before = loaded.stage2
    refuse(
        adata,
        lambda a: hv.tl.train_stage2(a, loaded, use_rep="X_histology", library_key="section", **QUICK),
        error,
        message,
    )
    refuse(
        adata,
        lambda a: hv.tl.train(a, use_rep="X_histology", library_key="section", config=small_config(), **QUICK),
        error,
        message,
    )
    assert loaded.stage2 is before


@pytest.mark.parametrize(("change", "error", "message"), HISTOLOGY)
def test_prediction_refuses_histology(query, model, change, error, message):
    change(query)
    refuse(query, lambda a: hv.tl.predict(a, model), error, message)


def test_niche_refuses(query):
    refuse(query, lambda a: hv.pp.niche(a, use_rep="absent"), KeyError, "use_rep: no 'absent'")
    refuse(query, lambda a: hv.pp.niche(a, use_rep=[]), ValueError, "use_rep: expected at least one key")
    refuse(query, lambda a: hv.pp.niche(a, use_rep="X_histology", n_neighbors=(60,)), ValueError, "has 60 spots")
    refuse(
        query,
        lambda a: hv.pp.niche(a, use_rep="X_histology", n_neighbors=(8, 4)),
        ValueError,
        "n_neighbors: expected numbers that",
    )
    refuse(
        query, lambda a: hv.pp.niche(a, use_rep="X_histology", library_key="slide"), KeyError, "library_key: no 'slide'"
    )


def test_prediction_refuses_another_width_and_number(query, model):
    query.obsm["X_histology"] = query.obsm["X_histology"][:, :9]
    refuse(query, lambda a: hv.tl.predict(a, model), ValueError, "has width 9, but the model was trained on width 16")
    refuse(
        query,
        lambda a: hv.tl.predict(a, model, use_rep=["X_histology", "spatial"]),
        ValueError,
        "trained on 1 embeddings",
    )


def test_prediction_refuses_impossible_requests(query, model):
    refuse(query, lambda a: hv.tl.predict(a, model, n_samples=-1), ValueError, "n_samples: expected at least 0, got -1")
    refuse(
        query,
        lambda a: hv.tl.predict(a, model, n_samples=9, quantiles=(5,)),
        ValueError,
        "quantiles: expected at most 1",
    )
    refuse(
        query,
        lambda a: hv.tl.predict(a, model, decoding="best"),
        ValueError,
        "decoding: expected 'expected', ",
    )
    refuse(query, lambda a: hv.tl.predict(a, model, device="cuda:9"), ValueError, "device: 'cuda:9' is not available")


def test_rows_that_disagree_are_refused(query, model):
    query.obsm["X_histology"] = query.obsm["X_histology"][:, :, None]
    refuse(query, lambda a: hv.tl.predict(a, model), ValueError, r"has shape \(60, 16, 1\), expected \(60, width\)")


def test_empty_object_is_refused(query, model):
    with pytest.raises(ValueError, match="adata: the object has no spots"):
        hv.tl.predict(query[:0].copy(), model)
    with pytest.raises(ValueError, match="adata: the object has no genes"):
        hv.tl.train_stage1(query[:, :0].copy())


def test_expression_is_checked(training, model):
    normalised = training.copy()
    normalised.X = training.X * 0.5
    refuse(normalised, lambda a: hv.pp.gene_panel(a, n_genes=5), ValueError, "X does not hold counts.*lognorm")
    refuse(normalised, lambda a: hv.tl.train_stage1(a, **QUICK), ValueError, "X does not hold counts")
    scaled = training.copy()
    scaled.layers["scaled"] = training.X.toarray() - 1
    refuse(
        scaled,
        lambda a: hv.tl.train_stage1(a, layer="scaled", **QUICK),
        ValueError,
        "layer: 'scaled' has negative values",
    )
    refuse(scaled, lambda a: hv.tl.tokenize(a, model, layer="scaled"), ValueError, "negative values")
    refuse(scaled, lambda a: hv.tl.tokenize(a, model, layer="absent"), KeyError, "layer: no 'absent' in layers")
    broken = training.copy()
    broken.layers["broken"] = sparse.csr_matrix(np.where(training.X.toarray() > 0, np.nan, 0))
    refuse(broken, lambda a: hv.tl.train_stage1(a, layer="broken", **QUICK), ValueError, "NaN or infinite")


def test_panel_and_scales_are_checked(training):
    refuse(training, lambda a: hv.pp.gene_panel(a, n_genes=41), ValueError, "41 genes requested, but only")
    refuse(
        training,
        lambda a: hv.pp.gene_panel(a, n_genes=5, flavor="best"),
        ValueError,
        "flavor: expected 'variance', ",
    )
    refuse(training, hv.pp.gene_scales, KeyError, "choose genes first with histovar.pp.gene_panel")
    hv.pp.gene_panel(training, n_genes=30)
    refuse(
        training,
        lambda a: hv.pp.gene_scales(a, scales=(8, 1)),
        ValueError,
        "scales: expected numbers that increase",
    )
    refuse(training, lambda a: hv.pp.gene_scales(a, gene_sets={"a": ["TP53"]}), ValueError, "none of their genes")
    refuse(
        training,
        lambda a: hv.tl.train_stage1(a, config=small_config(20), **QUICK),
        ValueError,
        "made for 20 genes, but the panel has 30",
    )


def test_configuration_of_other_scales_is_refused(prepared):
    config = small_config(scales=(1, 5, 10, 30))
    message = r"made for scales \(1, 5, 10, 30\), but varm\['histovar_scales'\] has \(1, 4, 10, 30\)"
    refuse(prepared.copy(), lambda a: hv.tl.train_stage1(a, config=config, **QUICK), ValueError, message)


def test_configuration_of_more_genes_than_there_are_is_refused(training):
    refuse(
        training, lambda a: hv.tl.train_stage1(a, config=small_config(41), **QUICK), ValueError, "41 genes requested"
    )


def test_missing_genes_are_named(query, model):
    gene = model.registry["genes"][0]
    lacking = query[:, query.var_names != gene].copy()
    refuse(lacking, lambda a: hv.tl.tokenize(a, model), KeyError, f"1 of the 30 panel genes are missing.*{gene}")
    hv.tl.predict(lacking, model)
    refuse(lacking, hv.tl.evaluate, KeyError, gene)


def test_reading_what_was_not_written(query):
    refuse(query, hv.tl.evaluate, KeyError, "predict first with histovar.tl.predict")
    refuse(query, hv.get.prediction, KeyError, "predict first")
    refuse(query, lambda a: hv.pl.spatial(a, "GENE1"), KeyError, "predict first")
    refuse(query, hv.pl.metrics, KeyError, "call histovar.tl.evaluate")


WRONG = [
    (lambda a, m: hv.pp.gene_panel(a, n_genes="5"), TypeError, "n_genes: expected a whole number, got '5'"),
    (lambda a, m: hv.pp.gene_panel(a, n_genes=True), TypeError, "n_genes: expected a whole number, got True"),
    (lambda a, m: hv.pp.gene_panel(a, min_fraction=np.nan), ValueError, "min_fraction: expected a finite number"),
    (lambda a, m: hv.pp.gene_panel(a, copy="no"), TypeError, "copy: expected True or False, got 'no'"),
    (lambda a, m: hv.pp.gene_panel(a, library_key=""), ValueError, "library_key: expected text that is not empty"),
    (lambda a, m: hv.pp.niche(a, use_rep={"X_histology"}), TypeError, "use_rep: expected a list, got {'X_histology'}"),
    (lambda a, m: hv.pp.niche(a), TypeError, "niche: missing a required argument: 'use_rep'"),  # type: ignore[call-arg]
    (lambda a, m: hv.pp.niche(a, use_rep="X_histology", table_name="t"), ValueError, "table_name: is for SpatialData"),
    (lambda a, m: hv.tl.predict(a, "model"), TypeError, "model: expected TwoStageVARST, got 'model'"),
    (lambda a, m: hv.tl.predict(a, m, n_samples=1.5), ValueError, "n_samples: expected a whole number, got 1.5"),
    (lambda a, m: hv.tl.predict(a, m, n_samples=10**9), ValueError, "n_samples: expected at most 10000"),
    (lambda a, m: hv.tl.predict(a, m, batch_size=0), ValueError, "batch_size: expected at least 1, got 0"),
    (lambda a, m: hv.tl.predict(a, m, random_state=None), TypeError, "random_state: expected a whole number, got None"),
    (lambda a, m: hv.tl.predict(a, m, top_k=5), ValueError, "top_k: nothing is drawn"),
    (lambda a, m: hv.tl.predict(a, m, device="meta"), ValueError, "device: expected 'auto' or a device of torch"),
    (lambda a, m: hv.tl.tokenize(a, hv.TwoStageVARST(m.config)), ValueError, "model: expected a model whose stage 1"),
    (
        lambda a, m: hv.tl.train_stage2(a, m, use_rep="X_histology", covariates="region"),
        TypeError,
        "covariates: expected",
    ),
    (
        lambda a, m: hv.tl.train(a, use_rep="X_histology", config=False),
        TypeError,
        "config: expected ModelConfig or None",
    ),
    (
        lambda a, m: hv.tl.train(a, use_rep="X_histology", stage2={"patience": 0}),
        ValueError,
        "stage2: patience: expected",
    ),
    (
        lambda a, m: hv.tl.baseline(a, "ridge_hest", use_rep="X_histology", random_state=1),
        ValueError,
        "random_state: 'ridge_hest' is deterministic",
    ),
    (lambda a, m: hv.pl.codebook(m, ax=[]), TypeError, "ax: expected Axes or None"),
    (lambda a, m: hv.pl.training(m, save="map.nonsense"), ValueError, "save: expected a file that ends in one of"),
    (
        lambda a, m: hv.pl.spatial(a, "GENE1", cmap="nonsense"),
        ValueError,
        "cmap: expected the name of a matplotlib",
    ),
    (lambda a, m: hv.datasets.simulate(n_spots=10**9), ValueError, "n_sections=4, n_spots=1000000000, .* of memory"),
    (lambda a, m: hv.metrics.pearson(np.ones((3, 2)), np.ones((2, 2))), ValueError, "measured: expected 3 spots"),
    (lambda a, m: hv.ModelConfig.default(30, n_heads=0), ValueError, "n_heads: expected at least 1, got 0"),
    (lambda a, m: m.save(""), ValueError, "path: expected a path that is not empty"),
    (lambda a, m: m.save_stage("d", True), TypeError, "stage: expected a whole number, got True"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_arguments_are_refused_in_one_line(query, model, call, error, message):
    refuse(query, lambda a: call(a, model), error, f"^{message}.*$")


def test_numpy_scalars_and_arrays_are_arguments(query, model):
    arguments = {"n_samples": np.int64(2), "quantiles": np.array([0.1, 0.9]), "temperature": np.float32(1)}
    hv.tl.predict(query, model, **arguments, batch_size=np.uint8(16), show_progress_bar=np.bool_(False))
    assert query.obsm["histovar_samples"].shape[2] == query.obsm["histovar_quantiles"].shape[2] == 2


@pytest.mark.parametrize("value", [[1, 2], "text", None])
def test_record_of_another_kind_is_refused(query, model, value):
    query.uns["histovar"] = value
    for call in (lambda a: hv.tl.predict(a, model), lambda a: hv.pp.gene_panel(a, n_genes=5), hv.tl.evaluate):
        refuse(query, call, ValueError, r"uns\['histovar'\] was not written by histovar")


@pytest.mark.parametrize(
    "make", [lambda x: np.where(x, "yes", "no"), lambda x: np.where(x, 1.0, np.nan), np.zeros_like]
)
def test_panel_that_is_none_is_refused(prepared, make):
    adata = prepared.copy()
    adata.var["histovar_panel"] = make(adata.var["histovar_panel"].to_numpy())
    refuse(adata, hv.pp.gene_scales, ValueError, r"adata: var\['histovar_panel'\]")
    refuse(adata, lambda a: hv.tl.train_stage1(a, **QUICK), ValueError, r"adata: var\['histovar_panel'\]")


@pytest.mark.parametrize("make", [lambda x: x.astype(str), lambda x: x + 1j, lambda x: x * 1e300, lambda x: x * np.nan])
def test_coordinates_that_are_none_are_refused(query, model, make):
    hv.tl.predict(query, model)
    query.obsm["spatial"] = make(query.obsm["spatial"])
    refuse(query, lambda a: hv.pp.niche(a, use_rep="X_histology"), ValueError, r"spatial_key: obsm\['spatial'\]")
    refuse(query, lambda a: hv.pl.spatial(a, model.registry["genes"][0]), ValueError, r"obsm\['spatial'\]")


def test_view_of_reversed_rows_and_sparse_coordinates_are_taken(query, model):
    query.obsm["spatial"] = sparse.csr_matrix(query.obsm["spatial"])
    reverse = query[::-1]
    hv.tl.predict(reverse, model)
    hv.tl.predict(query, model)
    np.testing.assert_allclose(reverse.obsm["histovar"], query.obsm["histovar"][::-1], atol=1e-5)


def test_changed_prediction_is_refused(query, model):
    hv.tl.predict(query, model, n_samples=2)
    query.obsm["histovar_samples"] = query.obsm["histovar_samples"][:, :5]
    for call in (hv.tl.evaluate, hv.get.prediction, hv.pl.gene_correlation):
        refuse(query, call, ValueError, r"key: obsm\['histovar_samples'\] holds float32 of shape \(60, 5, 2\)")
    del query.obsm["histovar_std"]
    refuse(query, hv.tl.evaluate, KeyError, "key: no 'histovar_std' in obsm")


def test_what_was_meant_is_said(query, model):
    """A misspelt option or gene, and the path of a model in place of the model."""
    refuse(query, lambda a: hv.tl.predict(a, model, **{"n_sample": 5}), TypeError, "did you mean 'n_samples'")
    refuse(query, lambda a: hv.tl.predict(a, "my_model"), TypeError, r"load it with histovar\.TwoStageVARST\.load")
    hv.tl.predict(query, model)
    gene = model.registry["genes"][0]
    refuse(query, lambda a: hv.pl.spatial(a, [gene.lower()], section="S4"), KeyError, f"did you mean {gene}")


def assert_same(now, before):
    """The same names and values, in the same order."""
    if isinstance(before, Mapping):
        assert list(now) == list(before)
        for name in before:
            assert_same(now[name], before[name])
    elif isinstance(before, pd.DataFrame):
        pd.testing.assert_frame_equal(now, before)
    else:
        now, before = (x.toarray() if sparse.issparse(x) else np.asarray(x) for x in (now, before))
        np.testing.assert_array_equal(now, before)


def assert_untouched(adata, before):
    assert_same(adata.X, before.X)
    for store in slots.STORES:
        assert_same(getattr(adata, store), getattr(before, store))


def without_lognorm(adata):
    del adata.layers["lognorm"]
    return adata


def predicted(adata, model):
    hv.tl.predict(adata, model, n_samples=2)
    hv.tl.evaluate(adata)
    return without_lognorm(adata)


def with_niche(adata, n_neighbors):
    hv.pp.niche(adata, use_rep="X_histology", n_neighbors=n_neighbors, library_key="section")
    return adata


def embed(adata):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    encoder = hv.encoders.Encoder(name="tiny", module=module, input_px=8)
    hv.pp.embed(adata, encoder, field_um=(112, 224), mpp=1.0, library_key="section")


WRITING = {
    "gene_panel": (lambda p, q, m: q, lambda a, m: hv.pp.gene_panel(a, n_genes=20)),
    "another gene_panel": (lambda p, q, m: without_lognorm(p), lambda a, m: hv.pp.gene_panel(a, n_genes=20)),
    "gene_scales": (lambda p, q, m: without_lognorm(p), lambda a, m: hv.pp.gene_scales(a, scales=(1, 5))),
    "niche": (lambda p, q, m: with_niche(q, [4]), lambda a, m: with_niche(a, [8])),
    "embed": (lambda p, q, m: q, lambda a, m: embed(a)),
    "tokenize": (lambda p, q, m: q, lambda a, m: hv.tl.tokenize(a, m)),
    "predict": (lambda p, q, m: predicted(q, m), lambda a, m: hv.tl.predict(a, m)),
    "evaluate": (lambda p, q, m: predicted(q, m), lambda a, m: hv.tl.evaluate(a)),
    "calibrate": (lambda p, q, m: q, lambda a, m: hv.tl.calibrate(a, m)),
    "baseline": (
        lambda p, q, m: q,
        lambda a, m: hv.tl.baseline(a, "ridge_hest", use_rep="X_histology", library_key="section"),
    ),
    "view": (lambda p, q, m: predicted(q, m)[5:], lambda a, m: hv.tl.evaluate(a)),
}


@pytest.mark.parametrize(("start", "call"), WRITING.values(), ids=WRITING)
def test_an_interrupted_call_leaves_the_object_as_it_was(prepared, query, loaded, start, call):
    """Interrupted as it is about to write for the first time, the second, and so on."""
    adata = start(prepared.copy(), query, loaded)
    before = adata.copy()
    for nth in count(1):
        left = nth

        def interrupt(frame, event, arg):
            nonlocal left
            if event == "call" and frame.f_code is slots.write.__code__:
                left -= 1
                if not left:
                    raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            call(adata, loaded)
        except KeyboardInterrupt:
            assert_untouched(adata, before)
        else:
            break
        finally:
            sys.setprofile(None)
    assert nth > 1
    with pytest.raises(AssertionError):
        assert_untouched(adata, before)


class PowerCut(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        raise OSError("no space left on device")


HISTOLOGY_OF = {"use_rep": "X_histology", "library_key": "section", "config": small_config()}
TRAINING = {
    "train_stage1": lambda a, m: hv.tl.train_stage1(a, config=small_config(), **QUICK, callbacks=[PowerCut()]),
    "train_stage2": lambda a, m: hv.tl.train_stage2(a, m, **HISTOLOGY_OF, **QUICK, callbacks=[PowerCut()]),
    "train": lambda a, m: hv.tl.train(a, **HISTOLOGY_OF, **QUICK, stage2={"callbacks": [PowerCut()]}),
}


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("call", TRAINING.values(), ids=TRAINING)
def test_failed_training_leaves_the_object_as_it_was(training, loaded, call):
    before = training.copy()
    with pytest.raises(OSError, match="no space left"):
        call(training, loaded)
    assert_untouched(training, before)
