import matplotlib.pyplot as plt
import numpy as np
import pytest

import histovar as hv


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def scored(query, model):
    hv.tl.predict(query, model)
    hv.tl.evaluate(query)
    return query


def values_of(ax):
    return np.concatenate([np.asarray(c.get_array()) for c in ax.collections if c.get_array() is not None])


def test_spatial_draws_measured_predicted_and_deviation(scored, model, tmp_path):
    genes = model.registry["genes"][:2]
    axes = hv.pl.spatial(scored, genes, save=tmp_path / "map.png")
    assert axes.shape == (2, 3) and (tmp_path / "map.png").stat().st_size > 10_000
    prediction = hv.get.prediction(scored)
    for row, gene in zip(axes, genes, strict=True):
        np.testing.assert_allclose(values_of(row[0]), scored[:, gene].layers["lognorm"].toarray()[:, 0], rtol=1e-5)
        np.testing.assert_allclose(values_of(row[1]), prediction[:, gene].X[:, 0], rtol=1e-5)
        np.testing.assert_allclose(values_of(row[2]), prediction[:, gene].layers["std"][:, 0], rtol=1e-5)
        limits = [c.get_clim() for ax in row[:2] for c in ax.collections if c.get_array() is not None]
        assert limits[0] == limits[1]
        assert all(ax.images for ax in row)


def test_spatial_without_measurement_or_image(query, model):
    hv.tl.predict(query, model)
    bare = hv.get.prediction(query)[:, :0].copy()
    bare.obsm["histovar"], bare.obsm["histovar_std"] = query.obsm["histovar"], query.obsm["histovar_std"]
    bare.uns = {"histovar": query.uns["histovar"]}
    axes = hv.pl.spatial(bare, model.registry["genes"][0])
    assert axes.shape == (1, 2) and not axes[0, 0].images


def test_spatial_takes_one_section_and_given_axes(simulated, model):
    adata = simulated.copy()
    hv.tl.predict(adata, model)
    gene = model.registry["genes"][0]
    with pytest.raises(ValueError, match="section: the object has sections"):
        hv.pl.spatial(adata, gene)
    with pytest.raises(ValueError, match="no section 'S9'"):
        hv.pl.spatial(adata, gene, section="S9")
    _, given = plt.subplots(1, 3)
    axes = hv.pl.spatial(adata, gene, section="S2", ax=given)
    assert list(axes[0]) == list(given) and len(values_of(given[0])) == 60
    with pytest.raises(ValueError, match="ax: expected 2 x 3 axes, got 3"):
        hv.pl.spatial(adata, model.registry["genes"][:2], section="S2", ax=given)
    with pytest.raises(KeyError, match="are not among the"):
        hv.pl.spatial(adata, "absent", section="S2")


def test_spatial_finds_genes_by_symbol(scored, model):
    first, second = model.registry["genes"][:2]
    scored.var["symbol"] = scored.var_names.str.lower()
    by_name, by_symbol = hv.pl.spatial(scored, second), hv.pl.spatial(scored, second.lower(), gene_symbols="symbol")
    np.testing.assert_array_equal(values_of(by_symbol[0, 1]), values_of(by_name[0, 1]))
    assert by_symbol[0, 0].get_title() == f"{second.lower()}\nmeasured"
    with pytest.raises(KeyError, match="genes: no gene of the predicted panel has the symbol"):
        hv.pl.spatial(scored, second, gene_symbols="symbol")
    with pytest.raises(KeyError, match="gene_symbols: no 'absent' in var"):
        hv.pl.spatial(scored, second, gene_symbols="absent")
    scored.var.loc[first, "symbol"] = second.lower()
    with pytest.raises(ValueError, match=f"genes: several genes have the same symbol.*{first}"):
        hv.pl.spatial(scored, second.lower(), gene_symbols="symbol")


def test_rankings_name_genes_by_symbol(scored, model):
    best = scored.var["histovar_pearson"].sort_values(ascending=False).index[:3]
    first = hv.get.genes(model)["expected_pearson"].idxmax()
    scored.var["symbol"] = scored.var_names.str.lower()
    scored.var.loc[best[0], "symbol"] = np.nan
    scored.var.loc[best[1:], "symbol"] = "twin"
    names = hv.pl.metrics(scored, n_labels=3, gene_symbols="symbol").texts[-1].get_text().split("\n")
    assert [name.split("  ")[1] for name in names] == [best[0], f"twin ({best[1]})", f"twin ({best[2]})"]
    scored.var["symbol"] = scored.var_names.str.lower()
    assert hv.pl.trust(model, scored, n_labels=1, gene_symbols="symbol").texts[-1].get_text().endswith(first.lower())
    for options in ({"data": scored}, {"gene_symbols": "symbol"}):
        with pytest.raises(ValueError, match="data, gene_symbols: give both or neither"):
            hv.pl.trust(model, **options)


def test_a_near_miss_of_the_column_of_symbols_is_told(scored, model, tmp_path):
    scored.var["symbol"] = scored.var_names
    options = {"gene_symbols": "symbols"}
    for call in (
        lambda: hv.pl.spatial(scored, model.registry["genes"][0], **options),
        lambda: hv.pl.metrics(scored, **options),
        lambda: hv.pl.trust(model, scored, **options),
        lambda: hv.pl.report(scored, tmp_path / "report.html", **options),
    ):
        with pytest.raises(KeyError, match="gene_symbols: no 'symbols' in var, which has .*; did you mean 'symbol'?"):
            call()


def test_colour_bars_of_maps_are_as_tall_as_the_map(scored, model):
    scored.obsm["spatial"] = scored.obsm["spatial"] * [3.0, 1.0]  # a wide section
    ax = hv.pl.spatial(scored, model.registry["genes"][0])[0, 0]
    ax.figure.draw_without_rendering()
    bar = ax.child_axes[0]
    assert bar.get_window_extent().height == pytest.approx(ax.get_window_extent().height, abs=1)


def test_training_codebook_and_metrics(scored, model, tmp_path):
    axes = hv.pl.training(model, save=tmp_path / "t.png")
    assert axes.shape == (2, 3) and all(ax.lines for ax in axes.flat)
    ax = hv.pl.codebook(model)
    assert len(ax.lines) == 4
    used = int((model.stage1.code_counts.sum(0) > 0).sum())
    assert str(used) in ax.get_title()
    ax = hv.pl.metrics(scored)
    assert len(ax.lines[0].get_xdata()) == 30
    assert "higher is better" in ax.get_ylabel()
    errors = hv.pl.metrics(scored, score="crps")
    assert errors.get_ylabel() == "crps, lower is better" and (np.diff(errors.lines[0].get_ydata()) >= 0).all()
    covered = hv.pl.metrics(scored, score="coverage")
    assert covered.get_ylabel() == "coverage, nearer to 0.9 is better"
    assert (np.diff(np.abs(covered.lines[0].get_ydata() - 0.9)) >= 0).all()
    with pytest.raises(ValueError, match="score: expected one of 'pearson'.*got 'accuracy'"):
        hv.pl.metrics(scored, score="accuracy")
    untrained = hv.TwoStageVARST(model.config)
    for plot in (hv.pl.training, hv.pl.codebook):
        with pytest.raises(ValueError, match="model: "):
            plot(untrained)


def test_calibration_plot_shows_coverage_of_what_there_is(query, model, model_of_values):
    query.layers["values"] = hv.tl.tokenize(query, model, copy=True).layers["lognorm"]
    for trained, options, kind in (
        (model, {}, "negative binomial"),
        (model, {"n_samples": 25}, "negative binomial"),
        (model_of_values, {}, "normal"),
        (model_of_values, {"n_samples": 25}, "draws"),
    ):
        hv.tl.predict(query, trained, **options)
        left, right = hv.pl.calibration(query)
        promised, covered = left.get_lines()[1].get_data()
        assert left.get_title() == f"intervals from {kind}, calibrated"
        assert promised.min() < 0.11 and promised.max() >= 0.9
        assert (np.diff(covered) > 0).all() and np.abs(covered - promised).max() < 0.25
        assert sum(p.get_height() * p.get_width() for p in right.patches) == pytest.approx(1)
    with pytest.raises(ValueError, match="ax: expected 1 x 2 axes, got 1"):
        hv.pl.calibration(query, ax=plt.figure().add_subplot())


def test_gene_correlation_plot_has_draws_where_there_are_any(query, model):
    hv.tl.predict(query, model)
    measured, expected = hv.pl.gene_correlation(query)
    assert measured.get_title() == "measured" and "expected, error" in expected.get_title()
    hv.tl.predict(query, model, n_samples=5)
    titles = [ax.get_title() for ax in hv.pl.gene_correlation(query)]
    errors = [float(t.split()[-1]) for t in titles[1:]]
    assert len(titles) == 3 and errors[1] < errors[0]


def test_plots_say_what_is_undefined(query, model):
    hv.tl.predict(query, model)
    genes = model.registry["genes"]
    hv.tl.evaluate(query)
    query.layers["lognorm"] = query.layers["lognorm"].toarray()
    query.layers["lognorm"][:, query.var_names.get_indexer(genes[:2])] = 0
    hv.tl.evaluate(query)
    assert hv.pl.metrics(query).get_title() == "28 genes, 2 undefined"
    assert "(r undefined)" in hv.pl.spatial(query, genes[0])[0, 1].get_title()
    assert "(r = " in hv.pl.spatial(query, genes[2])[0, 1].get_title()
    query.layers["lognorm"][:] = 0
    hv.tl.evaluate(query)
    assert hv.pl.metrics(query).get_title() == "0 genes, 30 undefined"
    assert hv.pl.gene_correlation(query)[1].get_title() == "expected, error undefined"
