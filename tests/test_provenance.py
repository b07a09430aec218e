"""No silent errors: units, genes, outdated slots, slots of the user, order of rows."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import sparse

import histovar as hv
from histovar.anndata_io import fingerprint
from histovar.anndata_io.neighbors import Neighborhoods

from .conftest import QUICK, few_steps, small_config
from .test_errors import refuse

KEY = "X_histology"
ONE_EPOCH = {"use_rep": KEY, "library_key": "section", "config": small_config(), **QUICK, "max_epochs": 1}
pytestmark = pytest.mark.usefixtures("brief")


def predicted(adata, model, **options):
    return hv.tl.predict(adata, model, copy=True, **options)


def values(adata, model):
    return predicted(adata, model).obsm["histovar"]


def panel_of(adata, model):
    return adata[:, model.registry["genes"]].copy()


# Genes of a prediction


@pytest.mark.parametrize("method", ["histovar", "ridge"])
def test_genes_dropped_or_renamed_since_the_prediction_are_named(training, query, model, method):
    panel = panel_of(query, model)
    if method == "ridge":
        hv.pp.gene_panel(training, n_genes=30)
        hv.tl.baseline(training, "ridge", use_rep=KEY, library_key="section").predict(panel)
    else:
        hv.tl.predict(panel, model)
    assert method in panel.layers
    reads = (
        lambda a: hv.get.prediction(a, method),
        lambda a: hv.pl.spatial(a, a.var_names[0], key=method),
        lambda a: hv.tl.evaluate(a, key=method),
        lambda a: hv.pl.calibration(a, key=method),
    )
    gone = panel.var_names[5]
    for read in reads:
        with pytest.raises(KeyError, match=gone):
            read(panel[:, :5].copy())
        renamed = panel.copy()
        renamed.var_names = [*panel.var_names[:5], "OTHER", *panel.var_names[6:]]
        with pytest.raises(KeyError, match=gone):
            read(renamed)
        swapped = panel.copy()
        swapped.var_names = panel.var_names[::-1]
        with pytest.raises(ValueError, match="genes were renamed"):
            read(swapped)
    reordered = hv.get.prediction(panel[:, ::-1].copy(), method)
    np.testing.assert_array_equal(reordered.X, hv.get.prediction(panel, method).X)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_any_gene_name_survives_the_disk(training, query, tmp_path, suffix):
    for adata in (training, query):
        adata.var_names = [f"CCL{i}/L1/L3" if i % 2 else f"a b.{i}" for i in range(adata.n_vars)]
    hv.pp.gene_panel(training, n_genes=30)
    model = hv.tl.train(training, use_rep=KEY, library_key="section", config=small_config(), **QUICK)
    for adata in (query, panel_of(query, model)):
        hv.tl.predict(adata, model)
        path = tmp_path / f"{adata.n_vars}.{suffix}"
        adata.write_h5ad(path) if suffix == "h5ad" else adata.write_zarr(path)
        again = hv.get.prediction(ad.read_h5ad(path) if suffix == "h5ad" else ad.read_zarr(path))
        assert list(again.var_names) == model.registry["genes"]
        np.testing.assert_array_equal(again.X, hv.get.prediction(adata).X)


def test_predictions_that_earlier_versions_wrote_are_read(query, model):
    hv.tl.predict(query, model)
    expected = hv.get.prediction(query)
    for key in ("histovar", "histovar_std"):
        frame = pd.DataFrame(query.obsm[key], query.obs_names, model.registry["genes"])
        query.obsm[key] = frame.iloc[:, ::-1]
    for entry in ("slots", "normalization"):
        del query.uns["histovar"][entry]
    np.testing.assert_array_equal(hv.get.prediction(query).X, expected.X)
    hv.tl.evaluate(query)
    hv.tl.predict(query, model)
    assert isinstance(query.obsm["histovar"], np.ndarray)


def test_predictions_that_were_joined(simulated, model):
    parts = [simulated[simulated.obs["section"] == name].copy() for name in ("S3", "S4")]
    for part in parts:
        hv.tl.predict(part, model)
    with pytest.raises(KeyError, match="uns_merge='same'"):
        hv.get.prediction(ad.concat(parts))
    joined = ad.concat(parts, uns_merge="same")
    np.testing.assert_array_equal(hv.get.prediction(joined).X, np.concatenate([p.obsm["histovar"] for p in parts]))
    hv.tl.evaluate(joined)
    hv.tl.predict(joined, model)


def test_predictions_of_two_models_are_not_joined(simulated, prepared, model):
    changed = prepared.copy()
    changed.var["histovar_panel"] = np.roll(changed.var["histovar_panel"].to_numpy(), 1)
    options = {"use_rep": KEY, "library_key": "section", "config": small_config(), **QUICK}
    models = {"S3": model, "S4": hv.tl.train(changed, **options)}
    parts = [predicted(simulated[simulated.obs["section"] == name].copy(), m) for name, m in models.items()]
    joined = ad.concat(parts, uns_merge="first")
    with pytest.raises(ValueError, match="60 spots have a prediction 'histovar' of other genes"):
        hv.get.prediction(joined)


# Units


def test_an_object_of_the_panel_alone_is_not_normalised_again(query, model, loaded):
    panel = panel_of(query, model)
    counts = r"normalised over the panel's 30 genes only, but was over 40 in training"
    hv.tl.predict(panel, model)
    for verb in (
        hv.tl.evaluate,
        lambda a: hv.tl.tokenize(a, model),
        lambda a: hv.tl.calibrate(a, loaded),
        lambda a: hv.tl.train_stage2(a, loaded, use_rep=KEY, library_key="section", **QUICK),
        hv.pl.calibration,
        hv.pl.gene_correlation,
    ):
        refuse(panel, verb, ValueError, counts)
    axes = hv.pl.spatial(panel, panel.var_names[0])
    assert axes.shape == (1, 2)  # nothing measured that could be compared
    # Normalised before genes were dropped, it is right.
    hv.pp.gene_panel(query, n_genes=30)
    proper = panel_of(query, model)
    hv.tl.predict(proper, model)
    hv.tl.predict(query, model)
    pd.testing.assert_frame_equal(
        hv.tl.evaluate(proper).drop(columns="partial_pearson"), hv.tl.evaluate(query).drop(columns="partial_pearson")
    )
    hv.tl.calibrate(proper, loaded)


@pytest.mark.parametrize("target", [1e6, 500.0])
def test_other_target_sums_are_refused(training, query, model, target):
    scaled = training.copy()
    counts = training.X.toarray()
    scaled.layers["lognorm"] = np.log1p(target * counts / counts.sum(1, keepdims=True))
    trained = hv.tl.train(scaled, use_rep=KEY, library_key="section", config=small_config(), **QUICK)
    assert trained.registry["units"] == f"log1p(counts per {target:,.0f})"
    hv.tl.predict(query, trained)
    message = f"normalised to 10,000 counts per spot, but was to {target:,.0f} in training"
    refuse(query, hv.tl.evaluate, ValueError, message)
    refuse(query, lambda a: hv.tl.tokenize(a, trained), ValueError, message)
    alike = query.copy()
    counts = query.X.toarray()
    alike.layers["lognorm"] = np.log1p(target * counts / counts.sum(1, keepdims=True))
    hv.tl.evaluate(alike)
    with pytest.raises(ValueError, match="normalised to"):
        hv.tl.evaluate(hv.tl.predict(alike, model, copy=True))


def test_one_section_in_other_units_is_refused(simulated, training, model):
    query = simulated.copy()
    hv.tl.predict(query, model)
    for adata in (query, training):
        counts = adata.X.toarray()
        target = np.where(adata.obs["section"] == "S3", 1e6, 1e4)[:, None]
        adata.layers["lognorm"] = np.log1p(target * counts / counts.sum(1, keepdims=True))
    refuse(query, hv.tl.evaluate, ValueError, "of section 'S3' is normalised to 1,000,000 counts per spot")
    message = r"section 'S1' holds log1p\(counts per 10,000\), section 'S3' log1p\(counts per 1,000,000\)"
    for verb in (hv.tl.train_stage1, lambda a, **k: hv.tl.baseline(a, use_rep=KEY, library_key=k["library_key"])):
        with pytest.raises(ValueError, match=message):
            verb(training.copy(), library_key="section")


def test_an_object_of_a_few_panel_genes_is_not_drawn_in_other_units(query, model):
    few = query[:, model.registry["genes"][:8]].copy()
    hv.tl.predict(few, model)
    assert hv.pl.spatial(few, few.var_names[0]).shape == (1, 2)


def test_leave_one_out_predictions_are_joined(simulated, model):
    parts = []
    for name in ("S3", "S4"):
        part = predicted(simulated[simulated.obs["section"] == name].copy(), model)
        part.uns["histovar"]["trained_on"] = np.array([f"all but {name}"])
        part.uns["histovar"]["normalization"] = {**part.uns["histovar"]["normalization"], "panel_low": len(parts) + 1.0}
        parts.append(part)
    joined = ad.concat(parts, uns_merge="same")
    assert np.isfinite(hv.tl.evaluate(joined)["pearson"]).all()


def test_counts_are_not_taken_for_their_logarithms(query, model):
    hv.tl.predict(query, model)
    query.layers["lognorm"] = query.X.copy()
    refuse(query, hv.tl.evaluate, ValueError, "holds counts, not their logarithms")
    refuse(
        query, lambda a: hv.tl.evaluate(a, layer="X"), ValueError, "holds counts, but the model was trained on log1p"
    )


def test_values_of_other_genes_are_warned_of(query, model, caplog):
    hv.tl.predict(query, model)
    rest = [g for g in query.var_names if g not in model.registry["genes"]]
    few = query[:, [*model.registry["genes"], *rest[:1]]].copy()
    few.layers["lognorm"] = query[:, few.var_names].X.log1p() * 1.0
    few.X = None
    hv.tl.evaluate(few)
    assert "these may be other units, or values normalised over other genes" in caplog.text
    few.layers["lognorm"] = few.layers["lognorm"] * 0.1
    with pytest.raises(ValueError, match="other units"):
        hv.tl.evaluate(few)


def test_model_keeps_its_units_on_disk(query, loaded, tmp_path):
    loaded.save(tmp_path / "m")
    again = hv.TwoStageVARST.load(tmp_path / "m")
    assert again.registry["normalization"] == loaded.registry["normalization"]
    assert again.registry["normalization"]["n_genes"] == 40 and again.registry["normalization"]["target_sum"] == 1e4
    refuse(panel_of(query, again), lambda a: hv.tl.tokenize(a, again), ValueError, "panel's 30 genes only")


def test_values_that_are_no_logarithms_are_refused(query, model):
    hv.tl.predict(query, model)
    counts = query.X.toarray()
    query.layers["lognorm"] = 1e4 * counts / counts.sum(1, keepdims=True)
    refuse(query, hv.tl.evaluate, ValueError, "holds no logarithms: its values reach")
    del query.layers["lognorm"]
    query.X = query.X.astype(bool)
    refuse(query, hv.tl.evaluate, ValueError, "X has data type bool, expected counts")


def test_layers_that_hold_counts_are_mentioned(training):
    training.layers["counts"] = training.X.copy()
    training.X = training.X.log1p()
    refuse(
        training, lambda a: hv.pp.gene_panel(a, n_genes=5), ValueError, r"layers\['counts'\] holds counts: adata.X ="
    )


# Slots that were made from something else


@pytest.mark.parametrize("target_sum", [1e4, 20.0], ids=["large values", "small values"])
def test_normalised_values_without_logarithms_are_refused(training, target_sum):
    sc.pp.normalize_total(training, target_sum=target_sum)
    training.layers["lognorm"] = training.X
    refuse(
        training, lambda a: hv.tl.train_stage1(a), ValueError, "lognorm'] holds no logarithms.*same sum in every spot"
    )
    sc.pp.log1p(training)
    training.layers["lognorm"] = training.X
    hv.tl.tokenize(training, hv.tl.train_stage1(training, **QUICK))


def test_lognorm_follows_the_counts(training, model, caplog):
    caplog.set_level("INFO")
    hv.pp.gene_panel(training, n_genes=30)
    fresh = training.copy()
    training.X = sparse.csr_matrix(np.random.default_rng(0).permutation(training.X.toarray()))
    tokens = hv.tl.tokenize(training, model, copy=True).obsm["histovar_tokens"]
    assert "was computed from other counts: computed again as" in caplog.text
    bare = ad.AnnData(training.X, obs=training.obs, var=training.var[[]])
    np.testing.assert_array_equal(tokens, hv.tl.tokenize(bare, model, copy=True).obsm["histovar_tokens"])
    assert (tokens != hv.tl.tokenize(fresh, model, copy=True).obsm["histovar_tokens"]).any()
    some = training[:50].copy()
    refuse(some, lambda a: hv.tl.tokenize(a, model), ValueError, "computed from other counts than X has now")


def test_lognorm_of_the_user_is_kept(query, model, caplog):
    own = query.X.log1p() * 1.1
    query.layers["lognorm"] = own.copy()
    hv.tl.tokenize(query, model)
    assert caplog.text.count("is not log1p of scaled counts in X") == 1
    assert abs(query.layers["lognorm"] - own).max() == 0


@pytest.mark.parametrize("change", ["embedding", "coordinates", "sections", "rows"])
def test_niche_is_made_again_when_its_source_has_changed(simulated, model, change, caplog):
    caplog.set_level("INFO")
    adata = simulated[simulated.obs["section"] != "S1"].copy()
    hv.pp.niche(adata, use_rep=KEY, n_neighbors=(4, 8), library_key="section")
    if change == "embedding":
        adata.obsm[KEY] = adata.obsm[KEY][::-1].copy()
    elif change == "coordinates":
        adata.obsm["spatial"] = np.random.default_rng(0).permutation(adata.obsm["spatial"])
    elif change == "sections":
        adata.obs["section"] = np.random.default_rng(0).permutation(adata.obs["section"].to_numpy())
    else:
        adata = adata[adata.obs_names[::-1]].copy()
    bare = adata.copy()
    for key in ("histovar_niche", "histovar_niche_source"):
        del bare.obsm[key]
    np.testing.assert_allclose(values(adata, model), values(bare, model), atol=1e-4)
    assert ("computed again" in caplog.text) == (change != "rows")


def test_niche_that_is_not_finite_is_refused(query, model):
    hv.pp.niche(query, use_rep=KEY, n_neighbors=(4, 8), library_key="section")
    query.obsm["histovar_niche"][3, 0] = np.nan
    refuse(query, lambda a: hv.tl.predict(a, model), ValueError, r"obsm\['histovar_niche'\] has NaN")


def test_scores_are_those_of_the_prediction_that_is_there(query, model):
    hv.tl.predict(query, model)
    hv.tl.evaluate(query)
    hv.tl.predict(query, model, decoding="greedy")
    assert not [c for c in query.var if c.startswith("histovar_")] and "evaluation" not in query.uns["histovar"]
    with pytest.raises(KeyError, match="evaluate"):
        hv.pl.metrics(query)


@pytest.mark.parametrize("slot", [KEY, "spatial"])
def test_predictions_of_other_embeddings_are_warned_of(query, model, caplog, slot):
    hv.tl.predict(query, model)
    caplog.clear()
    hv.get.prediction(query[5:20])
    assert not caplog.records
    query.obsm[slot] = query.obsm[slot] + (np.arange(60) < 7)[:, None]
    hv.get.prediction(query)
    assert "of 7 spots have changed since the prediction" in caplog.text


def test_scales_are_those_of_the_panel(training, caplog):
    caplog.set_level("INFO")
    hv.pp.gene_panel(training, n_genes=20)
    hv.pp.gene_scales(training, scales=(1, 4, 10))
    hv.pp.gene_panel(training, n_genes=30)
    assert "histovar_scales" not in training.varm and "scales" not in training.uns["histovar"]
    hv.pp.gene_scales(training, scales=(1, 4, 10))
    training.var["histovar_panel"] = np.arange(40) < 25  # by hand
    model = hv.tl.train_stage1(training, library_key="section", **QUICK)
    assert model.config.n_genes == 25 and "belongs to another panel" in caplog.text
    assert model.registry["genes"] == training.var_names[:25].tolist()
    hv.pp.gene_scales(training, scales=(1, 10), gene_sets={"a": training.var_names[:5].tolist()})
    training.var["histovar_panel"] = np.arange(40) < 30
    refuse(training, lambda a: hv.tl.train_stage1(a, **QUICK), ValueError, "has the gene sets of another panel")


def test_stages_that_were_not_trained_together_are_refused(prepared, model, tmp_path):
    other = hv.tl.train_stage1(prepared.copy(), library_key="section", config=small_config(), random_state=1, **QUICK)
    model.save(tmp_path / "ours")
    other.save(tmp_path / "theirs")
    message = "has a different stage 1 than this model"
    with pytest.raises(ValueError, match=message):
        other.load_stage(tmp_path / "ours", 2)
    with pytest.raises(ValueError, match=message):
        hv.TwoStageVARST.load(tmp_path / "ours").load_stage(tmp_path / "theirs", 1)
    hv.TwoStageVARST.load(tmp_path / "ours").load_stage(tmp_path / "ours", 1)


def test_calibration_is_forgotten_with_its_stage_2(prepared, loaded):
    assert "calibration" in loaded.registry
    hv.tl.train_stage2(prepared.copy(), loaded, use_rep=KEY, library_key="section", config=loaded.config, **QUICK)
    assert "calibration" not in loaded.registry and not loaded.stage2.is_calibrated


def test_fingerprints_of_rows_stay_with_their_rows():
    rng = np.random.default_rng(0)
    numbers, names = rng.normal(size=(200, 33)), rng.choice(["a", "b"], 200)
    found = fingerprint.of_rows(numbers, names)
    rows = rng.permutation(200)[:50]
    np.testing.assert_array_equal(fingerprint.of_rows(numbers[rows], names[rows]), found[rows])
    assert len(np.unique(found)) == 200
    for change in (1e-6, -1.0):
        other = numbers.copy()
        other[np.arange(200), rng.integers(0, 33, 200)] += change
        assert (fingerprint.of_rows(other, names) != found).all()
    swapped = numbers[:, [1, 0, *range(2, 33)]]
    assert (fingerprint.of_rows(swapped, names) != found).all()


# Slots of the user


@pytest.mark.parametrize("key", ["spatial", KEY, "lognorm", "X", "a/b", "a\\b", "", " ", "a ", "/", "..", "own"])
def test_slots_of_the_user_are_never_overwritten(training, query, model, key):
    for adata in (training, query):
        adata.obsm["own"] = adata.obsm[KEY] + 1
        adata.layers["own"] = adata.X.copy()
    refuse(query, lambda a: hv.tl.predict(a, model, key_added=key), ValueError, "key_added")
    hv.pp.gene_panel(training, n_genes=30)
    ridge = hv.tl.baseline(training, "ridge", use_rep=KEY, library_key="section")
    refuse(query, lambda a: ridge.predict(a, key_added=key), ValueError, "key_added")
    refuse(panel_of(query, model), lambda a: hv.tl.predict(a, model, key_added=key), ValueError, "key_added")


def test_other_slots_of_the_user_are_never_overwritten(training, query, model):
    training.var["mine_panel"] = "text"
    training.varm["mine_scales"] = np.zeros((40, 2))
    refuse(
        training, lambda a: hv.pp.gene_panel(a, n_genes=5, key_added="mine"), ValueError, "var.'mine_panel'. was not"
    )
    training.obsm["mine_niche"] = np.zeros((180, 2))
    refuse(
        training,
        lambda a: hv.pp.niche(a, use_rep=KEY, library_key="section", key_added="mine"),
        ValueError,
        "mine_niche",
    )
    query.obsm["mine_tokens"] = np.zeros((60, 2))
    for verb in (hv.tl.tokenize, hv.tl.predict):
        refuse(query, lambda a, verb=verb: verb(a, model, key_added="mine"), ValueError, "obsm.'mine_tokens'. was not")
    own = query.copy()
    own.obsm["histovar"] = np.zeros((60, 2))
    own.var["histovar_pearson"] = 1.0
    refuse(own, lambda a: hv.tl.predict(a, model), ValueError, "obsm.'histovar'. was not written by histovar")
    del own.obsm["histovar"]
    hv.tl.predict(own, model)
    assert (own.var["histovar_pearson"] == 1).all()
    query.uns["noted"] = {"by": "me"}
    query.uns["text"] = "mine"
    for key in ("noted", "text"):
        refuse(
            query, lambda a, key=key: hv.tl.predict(a, model, key_added=key), ValueError, "was not written by histovar"
        )
    hv.tl.predict(query, model)
    refuse(
        query, lambda a: hv.tl.predict(a, model, key_added="histovar_std"), ValueError, "obsm.'histovar_std'. was not"
    )
    query.var["other_pearson"] = 1.0
    hv.tl.predict(query, model, key_added="other")
    refuse(query, lambda a: hv.tl.evaluate(a, key="other"), ValueError, "var.'other_pearson'. was not")


def test_own_slots_are_overwritten(query, model):
    for key in ("histovar", "mine"):
        for _ in range(2):
            hv.tl.predict(query, model, key_added=key, n_samples=2)
            hv.tl.evaluate(query, key=key)
    hv.tl.predict(query, model, key_added="ridge, tuned (1)")
    hv.tl.predict(query, model, key_added="mine")
    assert "mine_samples" not in query.obsm and "obsm/mine_samples" not in query.uns["mine"]["slots"]


# Sections


def test_several_slides_are_not_taken_for_one(simulated, training, model, caplog):
    message = "library_key='section'"
    for verb in (
        lambda a: hv.pp.niche(a, use_rep=KEY),
        lambda a: hv.tl.train(a, use_rep=KEY, **QUICK),
        lambda a: hv.tl.baseline(a, use_rep=KEY),
    ):
        refuse(training, verb, ValueError, message)
    renamed = training.copy()
    renamed.obs = renamed.obs.rename(columns={"section": "slide"})
    refuse(renamed, lambda a: hv.tl.predict(a, model), ValueError, "library_key='slide'")
    one = training[training.obs["section"] == "S2"].copy()  # its uns has the images of all
    hv.pp.niche(one, use_rep=KEY)
    del training.uns["spatial"], training.obs["section"]
    training.obsm["spatial"] += np.arange(180)[:, None]
    caplog.clear()
    hv.pp.niche(training, use_rep=KEY)
    assert "library_key" not in caplog.text
    training.obsm["spatial"] = np.tile(training.obsm["spatial"][:60], (3, 1))
    hv.pp.niche(training, use_rep=KEY)
    assert "library_key: not given, but 120 of 180 spots have the same coordinates as another spot" in caplog.text


# Order and rotation


def grid(kind, side=12):
    column, row = (m.ravel().astype(float) for m in np.meshgrid(np.arange(side), np.arange(side)))
    if kind == "hexagonal":
        return 100 * np.stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2], 1)
    return 100 * np.stack([column, row], 1)


@pytest.mark.parametrize("kind", ["square", "hexagonal"])
@pytest.mark.parametrize("rounded", [False, True])
def test_neighbourhoods_depend_on_geometry_alone(kind, rounded):
    place = grid(kind)
    rows = np.random.default_rng(0).permutation(len(place))
    angle = 0.7
    turned = place @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned = turned.round() if rounded else turned.astype(np.float32).astype(float)
    straight, shuffled, rotated = (Neighborhoods.of(p, None, (8, 24)) for p in (place, place[rows], turned))
    for i, graph in enumerate(straight.graphs):
        assert abs(shuffled.graphs[i] - graph[rows][:, rows]).max() == 0
        assert abs(rotated.graphs[i] - graph).max() == 0
    middle = 6 * 12 + 6
    assert np.diff(straight.graphs[0].indptr)[middle] == (8 if kind == "square" else 12)
    np.testing.assert_allclose(shuffled.outline, straight.outline[rows], atol=1e-5)
    np.testing.assert_allclose(rotated.outline, straight.outline, atol=0.05)


def test_coincident_spots_have_neighbours():
    place = np.concatenate([np.zeros((300, 2)), grid("square", 5)])
    graph = Neighborhoods.of(place, None, (8,)).graphs[0]
    assert (np.diff(graph.indptr) >= 8).all() and graph.diagonal().max() == 0


def test_predictions_depend_neither_on_order_nor_on_rotation(simulated, model):
    rows = np.random.default_rng(0).permutation(simulated.n_obs)
    before = values(simulated, model)
    np.testing.assert_allclose(values(simulated[rows].copy(), model), before[rows], atol=1e-4)
    turned = simulated.copy()
    turned.obsm["spatial"] = turned.obsm["spatial"] @ np.array([[0.6, -0.8], [0.8, 0.6]])
    np.testing.assert_allclose(values(turned, model), before, atol=1e-3)


# Forms of data


@pytest.fixture(scope="module")
def of_array(prepared):
    """A model trained on embeddings in a 32-bit array; tests must not change it."""
    with few_steps():
        return hv.tl.train(prepared.copy(), **ONE_EPOCH)


def in_form(adata, form):
    other = adata.copy()
    array = np.asarray(adata.obsm[KEY], np.float32)
    other.obsm[KEY] = {
        "sparse": lambda: sparse.csr_matrix(array),
        "sparse array": lambda: sparse.csc_array(array),
        "nullable": lambda: pd.DataFrame(array, adata.obs_names).convert_dtypes(),
        "frame": lambda: pd.DataFrame(array, adata.obs_names),
        "reversed": lambda: array[:, ::-1].copy()[:, ::-1],
        "fortran": lambda: np.asfortranarray(array),
        "64 bits": lambda: array.astype(np.float64),
    }[form]()
    return other


@pytest.mark.parametrize("form", ["sparse", "sparse array", "nullable", "frame", "reversed", "fortran", "64 bits"])
def test_embeddings_of_any_form_are_the_same(prepared, query, model, of_array, form):
    expected = values(query, model)
    np.testing.assert_allclose(values(in_form(query, form), model), expected, atol=1e-5)
    other = hv.tl.train(in_form(prepared, form), **ONE_EPOCH)
    np.testing.assert_allclose(values(query, of_array), values(query, other), atol=1e-4)


def test_masked_values_are_missing(query, model):
    query.obsm[KEY] = np.ma.masked_greater(query.obsm[KEY], query.obsm[KEY].max() * 0.99)
    refuse(query, lambda a: hv.tl.predict(a, model), ValueError, "has NaN or infinite values in 1 rows")


def test_spots_in_one_place_are_refused(query, model):
    query.obsm["spatial"] = np.zeros((60, 2))
    refuse(query, lambda a: hv.tl.predict(a, model), ValueError, "has all 60 spots in one place")


@pytest.mark.parametrize("value", [1e39, -1e300, np.inf])
def test_embeddings_beyond_32_bits_are_refused(prepared, query, model, value):
    for adata in (prepared.copy(), query):
        adata.obsm[KEY] = adata.obsm[KEY].astype(np.float64)
        adata.obsm[KEY][4, 2] = value
        for verb in (
            lambda a: hv.tl.predict(a, model),
            lambda a: hv.tl.train(a, use_rep=KEY, library_key="section", **QUICK),
        ):
            refuse(
                adata,
                verb,
                ValueError,
                r"use_rep: obsm\['X_histology'\] has NaN or infinite values in 1 rows, first at row 4",
            )


def test_entries_stored_twice_are_summed(training, query, model):
    whole = query.X.tocoo()
    halves = [np.floor(whole.data / 2), np.ceil(whole.data / 2)]
    rows, columns = np.tile(whole.row, 2), np.tile(whole.col, 2)
    order = np.argsort(rows, kind="stable")
    pointers = np.concatenate([[0], np.bincount(rows, minlength=60).cumsum()])
    twice = sparse.csr_matrix((np.concatenate(halves)[order], columns[order], pointers), query.shape)
    doubled = query.copy()
    doubled.X = twice.copy()
    assert doubled.X.nnz == 2 * query.X.nnz
    for verb in (lambda a: hv.pp.gene_panel(a, n_genes=10), lambda a: hv.tl.tokenize(a, model)):
        verb(query)
        verb(doubled)
    assert abs(query.layers["lognorm"] - doubled.layers["lognorm"]).max() < 1e-6
    np.testing.assert_array_equal(query.obsm["histovar_tokens"], doubled.obsm["histovar_tokens"])
    assert doubled.X.nnz == twice.nnz  # the user's matrix is as it was


@pytest.mark.parametrize("n_columns", [1, 3])
def test_coordinates_are_two_columns(training, query, model, n_columns):
    for adata in (training, query):
        adata.obsm["spatial"] = np.random.default_rng(0).normal(size=(adata.n_obs, n_columns))
    expected = rf"spatial_key: obsm\['spatial'\] has shape \(60, {n_columns}\), expected \(60, 2\)"
    refuse(query, lambda a: hv.tl.predict(a, model), ValueError, expected)
    for verb in (
        lambda a: hv.tl.train(a, use_rep=KEY, library_key="section", **QUICK),
        lambda a: hv.pp.niche(a, use_rep=KEY, library_key="section"),
        lambda a: hv.tl.baseline(a, use_rep=KEY, library_key="section"),
    ):
        refuse(training, verb, ValueError, r"expected \(180, 2\)")


def test_a_view_of_a_backed_file_is_refused_or_copied(query, model, tmp_path):
    expected = values(query[:30].copy(), model)
    query.write_h5ad(tmp_path / "in.h5ad")
    view = ad.read_h5ad(tmp_path / "in.h5ad", backed="r")[:30]
    for verb in (
        lambda a: hv.tl.predict(a, model),
        lambda a: hv.pp.gene_panel(a, n_genes=5),
        lambda a: hv.tl.train_stage1(a),
    ):
        with pytest.raises(ValueError, match=r"view of a backed file cannot be written to.*to_memory\(\)"):
            verb(view)
    np.testing.assert_allclose(values(view, model), expected, atol=1e-5)


@pytest.mark.parametrize("n_spots", [9, 10, 19])
def test_too_few_training_spots_are_refused_before_any_work(training, n_spots):
    few = training[:n_spots].copy()
    refuse(
        few,
        lambda a: hv.tl.train(a, use_rep=KEY, library_key="section", **QUICK),
        ValueError,
        f"{n_spots} spots are too few",
    )


def test_torch_default_of_64_bit_floats_changes_nothing(prepared, query, of_array, tmp_path):
    expected = values(query, of_array)
    torch.set_default_dtype(torch.float64)
    try:
        model = hv.tl.train(prepared.copy(), **ONE_EPOCH)
        model.save(tmp_path / "m")
        made = values(query, hv.TwoStageVARST.load(tmp_path / "m"))
        hv.tl.tokenize(query, model)
        hv.tl.baseline(prepared.copy(), "mlp", use_rep=KEY, library_key="section").predict(query)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_sections_are_numbers_too(simulated, model):
    adata = simulated.copy()
    adata.obs["section"] = adata.obs["section"].cat.codes.astype(int)
    hv.tl.predict(adata, model)
    hv.tl.evaluate(adata)
    assert list(adata.uns["histovar"]["evaluation"].index) == ["0", "1", "2", "3", "mean"]
    names = values(simulated, model)
    np.testing.assert_allclose(adata.obsm["histovar"], names, atol=1e-5)


def test_threads_are_as_many_as_the_user_set(training):
    assert torch.get_num_threads() == 1  # conftest
    hv.pp.gene_panel(training, n_genes=30, flavor="seurat")
    hv.pp.niche(training, use_rep=KEY, library_key="section")
    hv.tl.baseline(training, "ridge", use_rep=KEY, library_key="section")
    assert torch.get_num_threads() == 1


def test_a_job_with_several_tasks_trains_in_one_process(prepared, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    model = hv.tl.train_stage1(prepared.copy(), library_key="section", config=small_config(), **QUICK)
    assert len(model.history["stage1"]) == 2
