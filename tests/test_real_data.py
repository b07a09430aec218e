"""The main job on her2st: skipped, with the reason, where the data are absent."""

import anndata as ad
import numpy as np

import histovar as hv


def test_reader_agrees_with_the_paired_object(data_dir):
    paired = ad.read_h5ad(data_dir / "her2st" / "paired.h5ad")
    read = hv.datasets.her2st(data_dir / "her2st" / "raw", image_width=200)
    assert set(read.obs_names) == set(paired.obs_names)
    read = read[paired.obs_names]
    np.testing.assert_allclose(read.obsm["spatial"], paired.obsm["spatial"], atol=0.5)
    np.testing.assert_array_equal(read.obs["array_row"], paired.obs["array_row"])
    shared = paired.var_names.intersection(read.var_names)
    assert len(shared) == paired.n_vars
    assert (read[:, shared].X != paired[:, shared].X).nnz == 0
    for section, image in paired.uns["spatial"].items():
        ours, theirs = (u["scalefactors"]["spot_diameter_fullres"] for u in (read.uns["spatial"][section], image))
        assert abs(ours - theirs) < 10


def test_default_settings_reach_their_score_on_an_unseen_section(data_dir):
    adata = ad.read_h5ad(data_dir / "her2st" / "paired.h5ad")
    training, query = (adata[adata.obs["section"].isin(s)].copy() for s in (["C2", "C3", "C4"], ["C5"]))
    hv.pp.gene_panel(training, n_genes=200)
    model = hv.tl.train(
        training,
        use_rep=["X_squeezenet", "X_squeezenet_wide"],
        library_key="section",
        enable_progress_bar=False,
        stage1={"max_epochs": 1},
        stage2={"max_epochs": 2},
    )
    assert (model.stage1.code_counts.sum(0) > 0).float().mean() >= 0.5
    hv.tl.predict(query, model)
    hv.tl.evaluate(query)
    summary = query.uns["histovar"]["evaluation"].loc["C5"]
    assert summary["PCC-200"] >= 0.36 and summary["MSE"] < 0.48
    measured = query[:, model.registry["genes"]].layers["lognorm"].toarray()
    made = hv.get.prediction(query)
    inside = np.abs(measured - made.X) < 1.645 * made.layers["std"]
    assert 0.82 < inside.mean() < 0.96
