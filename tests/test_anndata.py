"""What the functions of ``pp``, ``tl`` and ``get`` read from an AnnData, and write to it."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import TableModel

import histovar as hv
from histovar.anndata_io import expression, neighbors
from histovar.anndata_io.neighbors import Neighborhoods

from .conftest import QUICK, small_config

pytestmark = pytest.mark.usefixtures("brief")


def predicted(query, model, **options):
    return hv.tl.predict(query, model, copy=True, **options)


def test_panel_is_the_most_variable_of_the_detected_genes(training):
    hv.pp.gene_panel(training, n_genes=10, min_fraction=0.3)
    light = training.copy()
    sc.pp.normalize_total(light, target_sum=1e4)
    sc.pp.log1p(light)
    values = light.X.toarray()
    np.testing.assert_allclose(training.layers["lognorm"].toarray(), values, rtol=1e-5)
    variance = np.where((values > 0).mean(0) > 0.3, values.var(0), -1)
    assert set(training.var_names[training.var["histovar_panel"]]) == set(training.var_names[variance.argsort()[-10:]])


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "seurat_v3"])
def test_panel_by_scanpy(training, flavor):
    if flavor == "seurat_v3":
        pytest.importorskip("skmisc")
    hv.pp.gene_panel(training, n_genes=10, flavor=flavor, library_key="section")
    assert training.var["histovar_panel"].sum() == 10


def test_gene_sets_make_a_scale(training):
    hv.pp.gene_panel(training, n_genes=30)
    genes = training.var_names[training.var["histovar_panel"]].tolist()
    sets = {"first": genes[:8], "second": [*genes[6:14], "absent"], "third": genes[14:20]}
    hv.pp.gene_scales(training, scales=(1, 3, 10), gene_sets=sets)
    groups = pd.DataFrame(training.varm["histovar_scales"], index=training.var_names).loc[genes]
    assert groups.nunique().tolist() == [1, 4, 10, 30]
    by_set = groups[1]
    assert by_set.iloc[:8].nunique() == 1 and by_set.iloc[8:14].nunique() == 1 and by_set.iloc[20:].nunique() == 1
    assert (groups.groupby(2)[1].nunique() == 1).all()
    outside = ~training.var["histovar_panel"].to_numpy()
    assert (training.varm["histovar_scales"][outside] == -1).all()
    model = hv.tl.train_stage1(training, **QUICK)
    assert model.config.scales == (1, 4, 10, 30)


def test_niche_is_the_mean_of_the_neighbours_within_the_section(training):
    shuffled = training[np.random.default_rng(0).permutation(training.n_obs)].copy()
    hv.pp.niche(shuffled, use_rep="X_histology", n_neighbors=(4, 8), library_key="section")
    made = shuffled.obsm["histovar_niche"]
    assert made.shape == (shuffled.n_obs, 32 + 4)
    for spot in (0, 77):
        same = np.flatnonzero(shuffled.obs["section"] == shuffled.obs["section"].iloc[spot])
        distance = np.linalg.norm(shuffled.obsm["spatial"][same] - shuffled.obsm["spatial"][spot], axis=1)
        assert (np.diff(np.sort(distance))[[4, 8]] > -1).all()
        ties = distance <= np.sort(distance)[8] + 1e-6
        if ties.sum() == 9:
            near = same[np.argsort(distance)[1:9]]
            np.testing.assert_allclose(made[spot, 16:32], shuffled.obsm["X_histology"][near].mean(0), atol=1e-5)


def test_niche_features_show_how_near_the_outline_a_spot_lies():
    place = np.stack(np.meshgrid(np.arange(15.0), np.arange(15.0)), 2).reshape(-1, 2)
    names = np.repeat(["a", "b"], 225)
    found = Neighborhoods.of(np.concatenate([place, 100 * place + 7]), names, (8, 48)).outline
    np.testing.assert_allclose(found[:225], found[225:], atol=1e-4)  # in units of each section's own spacing
    corner, middle = 0, 7 * 15 + 7
    distance, offset = found[:, [0, 2]], found[:, [1, 3]]
    assert (distance[corner] > distance[middle] + 0.2).all()
    assert (offset[corner] > 0.5).all() and (offset[middle] < 0.1).all()


@pytest.mark.parametrize("stretch", [(1, 1), (0.01, 1), (20, 1)])
def test_neighbours_of_a_large_section_are_those_of_the_whole(monkeypatch, stretch):
    rng = np.random.default_rng(0)
    scattered = rng.random((20, 2)) * 5  # far apart, so that their neighbours lie in other strips
    place = np.concatenate([rng.random((1500, 2)), scattered]) * stretch
    whole = Neighborhoods.of(place, None, (8, 48))
    monkeypatch.setattr(neighbors, "SPOTS_AT_ONCE", 100)
    strips = Neighborhoods.of(place, None, (8, 48))
    for one, other in zip(whole.graphs, strips.graphs, strict=True):
        assert abs(one - other).max() == 0
    np.testing.assert_allclose(strips.outline, whole.outline, atol=1e-6)


def test_niche_features_of_versions_without_outline_are_made_again(query, model):
    expected = predicted(query, model).obsm["histovar"]
    hv.pp.niche(query, use_rep="X_histology", n_neighbors=(4, 8), library_key="section")
    query.obsm["histovar_niche"] = query.obsm["histovar_niche"][:, :32]
    np.testing.assert_allclose(predicted(query, model).obsm["histovar"], expected, atol=1e-4)


def test_prediction_with_and_without_niche_features_computed_before(query, model):
    before = predicted(query, model).obsm["histovar"]
    hv.pp.niche(query, use_rep="X_histology", n_neighbors=(4, 8), library_key="section")
    np.testing.assert_allclose(predicted(query, model).obsm["histovar"], before, atol=1e-4)
    some = predicted(query[:5].copy(), model).obsm["histovar"]  # too few for neighbourhoods made now
    assert np.isfinite(some).all().all()


def test_prediction_goes_to_obsm_or_layers(query, model):
    genes = model.registry["genes"]
    wide = predicted(query, model)
    frame = pd.DataFrame(wide.obsm["histovar"], columns=wide.uns["histovar"]["genes"])
    assert list(frame.columns) == genes and not wide.layers
    panel = query[:, genes[::-1]].copy()
    hv.tl.predict(panel, model)
    np.testing.assert_allclose(panel.layers["histovar"], frame[genes[::-1]])
    assert panel.layers["histovar_std"].dtype == np.float32 and "histovar" not in panel.obsm
    bare = ad.AnnData(obs=query.obs[["section"]], obsm=dict(query.obsm))
    hv.tl.predict(bare, model)
    np.testing.assert_allclose(bare.obsm["histovar"], frame)
    for made in (wide, panel, bare):
        view = hv.get.prediction(made)
        assert list(view.var_names) == genes
        np.testing.assert_allclose(view.X, frame)
        assert (view.layers["std"] > 0).all() and (view.X >= 0).all()
    assert wide.obsm["histovar_tokens"].shape == (60, 45)


def test_prediction_follows_measured_expression(query, model):
    hv.tl.predict(query, model)
    assert hv.tl.evaluate(query)["pearson"].mean() > 0.25


def test_batch_size_does_not_matter(query, model):
    one, other = (predicted(query, model, batch_size=b).obsm["histovar"] for b in (7, 64))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_order_of_spots_does_not_matter(training, model):
    rng = np.random.default_rng(0)
    rows = rng.permutation(training.n_obs)
    straight = predicted(training, model).obsm["histovar"]
    shuffled = predicted(training[rows].copy(), model).obsm["histovar"]
    np.testing.assert_allclose(shuffled, straight[rows], atol=1e-4)


@pytest.mark.parametrize("trained_on", ["model", "model_of_values"])
def test_tokens_are_left_out_and_nothing_else_changes(query, trained_on, request):
    model = request.getfixturevalue(trained_on)
    with_tokens = predicted(query, model, quantiles=(0.1, 0.9))
    without = predicted(query, model, quantiles=(0.1, 0.9), tokens=False)
    assert set(with_tokens.obsm) - set(without.obsm) == {"histovar_tokens"}
    for key in without.obsm:
        np.testing.assert_allclose(np.asarray(without.obsm[key]), np.asarray(with_tokens.obsm[key]), atol=1e-5)
    hv.tl.predict(with_tokens, model, tokens=False)
    assert "histovar_tokens" not in with_tokens.obsm and "tokens" not in with_tokens.uns["histovar"]


def test_samples_and_quantiles(query, model):
    made = predicted(query, model, n_samples=30, quantiles=(0.1, 0.5, 0.9))
    again = predicted(query, model, n_samples=30, quantiles=(0.1, 0.5, 0.9))
    np.testing.assert_array_equal(made.obsm["histovar_samples"], again.obsm["histovar_samples"])
    assert made.obsm["histovar_samples"].shape == (60, 30, 30)
    view = hv.get.prediction(made)
    assert (view.layers["q0.1"] <= view.layers["q0.5"]).all() and (view.layers["q0.5"] <= view.layers["q0.9"]).all()
    np.testing.assert_array_equal(view.layers["sample_3"], made.obsm["histovar_samples"][:, :, 3])
    hv.tl.predict(made, model)
    assert "histovar_samples" not in made.obsm


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip_on_disk(query, model, tmp_path, suffix):
    hv.tl.predict(query, model, n_samples=3, quantiles=(0.5,))
    hv.tl.tokenize(query, model, key_added="measured")
    hv.tl.evaluate(query)
    path = tmp_path / f"query.{suffix}"
    if suffix == "h5ad":
        query.write_h5ad(path)
        again = ad.read_h5ad(path)
    else:
        query.write_zarr(path)
        again = ad.read_zarr(path)
    expected, made = hv.get.prediction(query), hv.get.prediction(again)
    np.testing.assert_array_equal(made.X, expected.X)
    assert set(made.layers) == set(expected.layers)
    pd.testing.assert_frame_equal(
        again.uns["histovar"]["evaluation"], query.uns["histovar"]["evaluation"], check_index_type=False
    )
    hv.tl.evaluate(again)


def test_backed_object(query, model, tmp_path):
    expected = predicted(query, model)
    hv.tl.evaluate(expected)
    query.write_h5ad(tmp_path / "backed.h5ad")
    backed = ad.read_h5ad(tmp_path / "backed.h5ad", backed="r")
    made = predicted(backed, model)
    hv.tl.evaluate(made)
    np.testing.assert_allclose(made.var["histovar_pearson"], expected.var["histovar_pearson"])
    hv.tl.predict(backed, model)
    hv.tl.evaluate(backed)
    np.testing.assert_allclose(backed.var["histovar_pearson"], expected.var["histovar_pearson"])


def test_backed_training(training, model, tmp_path, prepared):
    training.write_h5ad(tmp_path / "backed.h5ad")
    backed = ad.read_h5ad(tmp_path / "backed.h5ad", backed="r")
    hv.pp.gene_panel(backed, n_genes=30)
    hv.pp.gene_scales(backed, scales=(1, 4, 10))
    np.testing.assert_array_equal(backed.varm["histovar_scales"], prepared.varm["histovar_scales"])
    hv.tl.tokenize(backed, model)
    assert backed.obsm["histovar_tokens"].dtype == np.int32


def test_dense_and_sparse_expression_agree(query, model):
    dense = query.copy()
    dense.X = query.X.toarray()
    csc = query.copy()
    csc.X = sparse.csc_matrix(query.X)
    for adata in (query, dense, csc):
        hv.tl.tokenize(adata, model)
    np.testing.assert_array_equal(query.obsm["histovar_tokens"], dense.obsm["histovar_tokens"])
    np.testing.assert_array_equal(query.obsm["histovar_tokens"], csc.obsm["histovar_tokens"])


def test_view_becomes_an_object_and_its_parent_stays(simulated, model):
    parent = simulated.copy()
    view = parent[parent.obs["section"] == "S4"]
    hv.tl.predict(view, model)
    assert not view.is_view and "histovar" in view.obsm
    assert "histovar" not in parent.obsm and "histovar" not in parent.uns


def test_string_sections_stay_strings(query, model):
    query.obs["section"] = query.obs["section"].astype(str)
    dtype = query.obs["section"].dtype
    hv.tl.predict(query, model)
    hv.pl.spatial(query, model.registry["genes"][0])
    assert query.obs["section"].dtype == dtype


def test_one_section_without_library_key(query):
    hv.pp.gene_panel(query, n_genes=30)
    hv.pp.gene_scales(query, scales=(1, 4, 10))
    model = hv.tl.train(query, use_rep="X_histology", config=small_config(), **QUICK)
    hv.tl.predict(query, model)
    hv.tl.evaluate(query)
    assert list(query.uns["histovar"]["evaluation"].index) == ["all", "mean"]


def test_skipped_steps_are_done(training):
    model = hv.tl.train_stage1(training, **QUICK)
    assert {"histovar_panel"} <= set(training.var) and "histovar_scales" in training.varm
    assert model.registry["units"] == "log1p(counts per 10,000)"


def test_a_configuration_decides_the_steps_that_are_skipped(training):
    model = hv.tl.train_stage1(
        training, config=small_config(20, scales=(1, 5, 20), components=(2, 1, 1), encoder_hidden=(8, 8, 8)), **QUICK
    )
    assert training.var["histovar_panel"].sum() == 20
    assert (training.varm["histovar_scales"].max(0) + 1).tolist() == [1, 5, 20] == list(model.config.scales)


def test_niche_features_outlive_the_spots_they_came_from(training):
    hv.pp.niche(training, use_rep="X_histology", n_neighbors=(4, 8), library_key="section")
    for n_left in (1, 5):
        few = training[[*range(n_left), *range(60, 180)]].copy()
        hv.pp.gene_panel(few, n_genes=30)
        model = hv.tl.train(few, use_rep="X_histology", library_key="section", config=small_config(), **QUICK)
        assert model.registry["n_spots_stage2"] == 120 + n_left


def test_several_embeddings_covariates_and_key(training, query):
    rng = np.random.default_rng(0)
    for adata in (training, query):
        adata.obsm["wide"] = rng.normal(size=(adata.n_obs, 7)).astype(np.float32)
        adata.obs["age"] = rng.normal(50, 10, adata.n_obs)
        adata.obs["stage"] = pd.Categorical(rng.choice(["I", "II"], adata.n_obs))
    model = hv.tl.train(
        training,
        use_rep=["X_histology", "wide"],
        library_key="section",
        covariates=["age", "stage"],
        config=None,
        key_added="other",
        **{**QUICK, "max_epochs": 1},
    )
    assert model.config.embedding_dims == (16, 7) and model.config.n_covariates == 3
    hv.tl.predict(query, model, key_added="other")
    assert {"other", "other_std", "other_tokens"} <= {*query.obsm, *query.layers}
    hv.tl.evaluate(query, key="other")
    assert "other_pearson" in query.var
    query.obs["stage"] = "IV"
    with pytest.raises(ValueError, match="categories.*IV"):
        hv.tl.predict(query, model, key_added="other")


def test_spatialdata(query, model):
    table = query.copy()
    table.obs["region"] = pd.Categorical(["S4"] * table.n_obs)
    table.obs["instance"] = np.arange(table.n_obs)
    parsed = TableModel.parse(table, region="S4", region_key="region", instance_key="instance")
    sdata = SpatialData(tables={"spots": parsed})
    hv.tl.predict(sdata, model, table_name="spots")
    hv.tl.evaluate(sdata)
    view = hv.get.prediction(sdata)
    assert "spatialdata_attrs" in view.uns and "spatialdata_attrs" in sdata.tables["spots"].uns
    np.testing.assert_allclose(view.X, predicted(query, model).obsm["histovar"], atol=1e-5)
    with pytest.raises(KeyError, match="no table 'cells'"):
        hv.tl.predict(sdata, model, table_name="cells")
    with pytest.raises(TypeError, match="AnnData or SpatialData"):
        hv.tl.predict("file.h5ad", model)


def test_evaluation_scores_each_section_and_counts_constant_predictions(simulated, model):
    adata = simulated[simulated.obs["section"].isin(["S3", "S4"])].copy()
    hv.tl.predict(adata, model)
    adata.obsm["histovar"][:, 0] = 1.0
    scores = hv.tl.evaluate(adata)
    summary = adata.uns["histovar"]["evaluation"]
    assert list(summary.index) == ["S3", "S4", "mean"]
    gene = model.registry["genes"][0]
    assert scores.loc[gene, "pearson"] == 0 and scores.loc[gene, "constant"]
    assert summary.loc["S3", "n_constant"] == 1
    part = adata[adata.obs["section"] == "S3"]
    measured = expression.lognorm(part)[:, part.var_names.get_indexer(model.registry["genes"])].toarray()
    by_hand = [np.corrcoef(a, b)[0, 1] for a, b in zip(part.obsm["histovar"].T[1:], measured.T[1:], strict=True)]
    assert summary.loc["S3", "PCC-all"] == pytest.approx(np.sum(by_hand) / 30, abs=1e-5)
    assert summary.loc["S3", "PCC-10"] == pytest.approx(np.sort(by_hand)[-10:].mean(), abs=1e-5)


CORRELATIONS = ["PCC-10", "PCC-all", "Spearman", "PCC-partial", "RVD", "correlation error", "PIT deviation"]


def test_a_section_of_one_spot_does_not_change_the_mean_of_the_others(simulated, model, caplog):
    adata = simulated[simulated.obs["section"].isin(["S3", "S4"])].copy()
    hv.tl.predict(adata, model, n_samples=4)
    both, alone = adata[59:].copy(), adata[60:].copy()  # with one spot of S3, and without
    before = hv.tl.evaluate(alone)
    assert "undefined" not in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        after = hv.tl.evaluate(both)
    expected, summary = (a.uns["histovar"]["evaluation"] for a in (alone, both))
    columns = [*CORRELATIONS, "RVD of draws", "correlation error of draws", "uncertainty PCC"]
    assert summary.loc["S3", columns].isna().all()
    assert list(summary.columns) == list(expected.columns)
    assert summary.loc["mean", columns].notna().all()
    np.testing.assert_allclose(summary.loc["mean", columns], expected.loc["mean", columns])
    assert summary.loc["S3", ["MSE", "MAE", "CRPS", "coverage 90", "width 90"]].notna().all()
    assert summary.loc["mean", "MSE"] == pytest.approx(summary.loc[["S3", "S4"], "MSE"].mean())
    assert summary.loc["S3", ["n_constant", "n_undefined"]].tolist() == [0, 30]
    assert summary.loc["S4", "n_undefined"] == 0
    names = ["pearson", "spearman", "partial_pearson"]
    np.testing.assert_allclose(after[names], before[names])
    assert both.var["histovar_constant"].sum() == 0
    (warned,) = [r.message for r in caplog.records if "undefined" in r.message]
    assert warned == "undefined, and left out of the means: correlations in sections ['S3'], which have a single spot"


def test_genes_that_do_not_vary_are_left_out_and_counted(simulated, model, caplog):
    caplog.set_level("INFO")
    adata = simulated[simulated.obs["section"].isin(["S3", "S4"])].copy()
    hv.tl.predict(adata, model)
    hv.tl.evaluate(adata)
    complete = adata.uns["histovar"]["evaluation"].copy()
    genes = model.registry["genes"]
    measured = adata.layers["lognorm"].toarray()
    inside = (adata.obs["section"] == "S3").to_numpy()
    measured[np.ix_(inside, adata.var_names.get_indexer(genes[:2]))] = 0.7
    adata.layers["lognorm"] = measured
    adata.obsm["histovar"][:, 1:3] = 1.0  # constant: not counted where undefined
    caplog.clear()
    scores = hv.tl.evaluate(adata)
    summary = adata.uns["histovar"]["evaluation"]
    assert summary["n_undefined"].tolist() == [2, 0, 1]
    assert summary["n_constant"].tolist() == [1, 2, 1.5]
    part = adata[inside]
    by_hand = [
        np.corrcoef(p, part[:, g].layers["lognorm"].ravel())[0, 1]
        for p, g in zip(part.obsm["histovar"].T[3:], genes[3:], strict=True)
    ]
    assert summary.loc["S3", "PCC-all"] == pytest.approx(np.sum(by_hand) / 28, abs=1e-5)
    other = adata[~inside]
    only = np.corrcoef(other.obsm["histovar"][:, 0], other[:, genes[0]].layers["lognorm"].ravel())[0, 1]
    assert scores.loc[genes[0], "pearson"] == pytest.approx(only, abs=1e-5)
    assert scores.loc[genes[1], ["pearson", "constant"]].tolist() == [0, True]
    assert complete["n_undefined"].tolist() == [0, 0, 0]
    (warned,) = [r.message for r in caplog.records if "undefined" in r.message]
    assert warned.endswith(": correlations of genes whose measurement is constant (2 in 'S3')")
    assert "3 constant predictions" in caplog.text


def test_what_is_undefined_is_named_with_its_cause(simulated, model, caplog):
    adata = simulated[simulated.obs["section"] != "S1"].copy()
    hv.tl.predict(adata, model)
    few = adata[[*range(3), *range(60, 180)]].copy()  # 3 spots of S2
    genes = few.var_names.get_indexer(model.registry["genes"])
    few.obsm["histovar"][-1, 0] = np.nan
    expression.add_lognorm(few)
    measured = few.layers["lognorm"].toarray()
    measured[np.ix_((few.obs["section"] == "S3").to_numpy(), genes[5:27])] = measured[:, genes[5:27]].mean(0)
    few.layers["lognorm"] = measured
    hv.tl.evaluate(few)
    (warned,) = [r.message for r in caplog.records if "undefined" in r.message]
    assert "measurement is constant (22 in 'S3'" in warned
    assert "NaN or infinite (1 in 'S4')" in warned
    assert "PCC-partial in ['S2'], which have fewer than 5 spots" in warned
    evaluation = few.uns["histovar"]["evaluation"]
    assert evaluation.loc["S3", "PCC-10"] == evaluation.loc["S3", "PCC-all"]


def test_one_spot_alone_is_evaluated_without_correlations(query, model, caplog):
    caplog.set_level("INFO")
    one = predicted(query, model)[:1].copy()
    scores = hv.tl.evaluate(one)
    assert scores["pearson"].isna().all() and scores[["mse", "crps", "coverage"]].notna().all(axis=None)
    assert one.uns["histovar"]["evaluation"].loc["mean", CORRELATIONS].isna().all()
    assert "no correlation is defined" in caplog.text


def test_evaluating_what_was_trained_on_is_warned_of(training, query, model, caplog):
    for adata, warned in ((training, True), (query, False)):
        caplog.clear()
        hv.tl.predict(adata, model)
        hv.tl.evaluate(adata)
        assert any("among those trained on" in r.message for r in caplog.records) == warned


def test_neighbourhoods_are_cut_to_a_quarter_of_a_small_section(simulated, caplog):
    small = simulated[simulated.obs["section"] == "S1"][:24].copy()
    small.obsm["X_place"] = np.asarray(small.obsm["spatial"], dtype=np.float32)
    hv.pp.niche(small, use_rep="X_place", n_neighbors=(8, 48), library_key="section")
    assert "neighbourhoods of 48 are cut to 6 in section 'S1' of 24 spots" in caplog.text
    near, far = np.split(np.asarray(small.obsm["histovar_niche"])[:, :-4], 2, axis=1)
    for mean in (near, far):
        assert (hv.metrics.pearson(mean, small.obsm["X_place"]) > 0.7).all()


def test_a_panel_set_by_hand_is_used(training):
    training.var["histovar_panel"] = np.arange(training.n_vars) < 25
    model = hv.tl.train_stage1(training, library_key="section", **QUICK)
    assert model.registry["genes"] == training.var_names[:25].tolist()
