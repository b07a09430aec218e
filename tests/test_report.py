"""The report as it looks in a browser without a network."""

import re
import sys
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import histovar as hv
from histovar._keys import Keys
from histovar.report import collect, write_page

from . import browser as browsers

# Values of the page are whole steps of a thousandth of a gene's range, and are shown to three decimals.
STEP = 1e-3

# Milliseconds; a machine that does much else at once is slow to start a browser.
PATIENCE = 180_000

BY_DEFAULT = dict.fromkeys(("genes", "gene_symbols", "library_key", "layer"))


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("playwright", reason="Playwright is not installed: pip install --group test")
    try:
        with browsers.launched() as launched:
            yield launched
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def predicted(simulated, model):
    """Two predicted sections, of which S3 was trained on."""
    adata = simulated[simulated.obs["section"].isin(["S3", "S4"])].copy()
    hv.tl.predict(adata, model)
    hv.tl.evaluate(adata)
    return adata


@pytest.fixture(scope="module")
def report(predicted, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    hv.pl.report(predicted, path, model, title="Two sections")
    return path


@pytest.fixture
def page(browser, report):
    context = browser.new_context(offline=True, viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda r: page.problems.append(r.url) if r.url.startswith("http") else None)
    page.goto(report.as_uri())
    page.wait_for_function("window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle")
    yield page
    assert page.problems == []
    context.close()


def on_screen(page, x, y):
    """Where a place of the slide is on the screen."""
    return page.evaluate(
        """([x, y]) => {
          const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name("map"))
          const box = view.el.getBoundingClientRect()
          return [box.left + view.frame.x_scale.compute(x), box.top + view.frame.y_scale.compute(y)]
        }""",
        [x, y],
    )


def pointed_at(page, adata, spot):
    """Text that the page shows when one points at a spot."""
    x, y = on_screen(page, *map(float, adata.obsm["spatial"][adata.obs_names.get_loc(spot)]))
    page.mouse.move(x - 3, y - 3)
    page.mouse.move(x, y)
    tip = page.locator(".bk-Tooltip")
    tip.wait_for()
    labels, values = (tip.locator(f".bk-tooltip-row-{part}").all_inner_texts() for part in ("label", "value"))
    return {label.rstrip(": "): value for label, value in zip(labels, values, strict=True)}


def shows(page, text):
    """Whether the page shows a text."""
    found = page.get_by_text(text)
    return found.count() > 0 and found.first.is_visible()


def colour_at(page, adata, spot):
    """Colour in the middle of a spot."""
    x, y = on_screen(page, *map(float, adata.obsm["spatial"][adata.obs_names.get_loc(spot)]))
    page.mouse.move(5, 5)
    page.wait_for_timeout(300)
    picture = page.screenshot(clip={"x": round(x) - 1, "y": round(y) - 1, "width": 2, "height": 2})

    return np.asarray(Image.open(BytesIO(picture)).convert("RGB"), dtype=float).mean((0, 1))


def test_chosen_gene_is_shown_with_its_values_on_hover(page, predicted):
    prediction = hv.get.prediction(predicted)
    sdata = hv.get.spatialdata(predicted)
    gene = prediction.var_names[7]
    page.get_by_label("Section").select_option(label="S4")
    page.get_by_label("Gene").select_option(label=gene)
    spot = next(name for name in prediction.obs_names if name.startswith("S4"))
    found = pointed_at(page, predicted, spot)
    of_spot = prediction[spot, gene]
    table = sdata.tables["histovar"][spot, gene]
    expected = {
        "predicted mean": of_spot.X,
        "standard deviation": of_spot.layers["std"],
        "lower bound (5 %)": table.layers["lower"],
        "upper bound (95 %)": table.layers["upper"],
        "measured": predicted[spot, gene].layers["lognorm"].toarray(),
    }
    assert found.pop("spot") == spot
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value.item(), abs=STEP * 10), name
    title = page.evaluate("Bokeh.documents[0].get_model_by_name('map').title.text")
    assert title == f"{gene} in S4"


def test_the_table_of_genes_has_room_for_all_columns(page):
    tables = page.locator(".slick-viewport")
    assert tables.count()
    assert all(tables.nth(i).evaluate("e => e.scrollWidth <= e.clientWidth") for i in range(tables.count()))


def test_quantity_changes_colours_and_slider_shows_the_tissue(page, predicted):
    spot = predicted.obs_names[predicted.obs["section"] == "S3"][10]
    mean = colour_at(page, predicted, spot)
    page.get_by_label("Show").select_option(label="standard deviation")
    assert np.abs(colour_at(page, predicted, spot) - mean).max() > 10
    page.locator(".noUi-handle").focus()
    page.keyboard.press("Home")
    image = predicted.uns["spatial"]["S3"]["images"]["hires"]
    factor = predicted.uns["spatial"]["S3"]["scalefactors"]["tissue_hires_scalef"]
    x, y = (predicted.obsm["spatial"][predicted.obs_names.get_loc(spot)] * factor).astype(int)
    tissue = image[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
    assert np.abs(colour_at(page, predicted, spot) - tissue).max() < 45
    page.keyboard.press("End")
    assert page.get_by_text("Opacity of the spots:").inner_text().endswith("1")


def test_row_of_the_table_chooses_the_gene(page):
    row = page.locator(".slick-row").nth(2)
    gene = row.locator(".slick-cell").first.inner_text()
    row.locator(".slick-cell").first.click()
    page.wait_for_function(
        "gene => Bokeh.documents[0].get_model_by_name('map').title.text.startsWith(gene + ' in')", arg=gene
    )
    assert page.get_by_label("Gene").locator("option:checked").inner_text() == gene


def test_page_says_what_it_rests_on(page):
    assert shows(page, "Two sections") and shows(page, "log1p(counts per 10,000)")
    assert shows(page, "Section S3 was used in training") and not shows(page, "Section S4 was used")
    page.locator(".bk-tab", has_text="Model").click()
    assert shows(page, "180 spots of 3 sections: S1, S2, S3") and shows(page, "X_histology (16 numbers)")
    page.locator(".bk-tab", has_text="Scores").click()
    assert shows(page, "PCC-10")
    page.locator(".bk-tab", has_text="Calibration").click()
    assert shows(page, "Intervals are right on the dashed line")


def test_prediction_without_genes_image_or_section_names(browser, query, model, tmp_path):
    hv.tl.predict(query, model)
    bare = query[:, :0].copy()
    for name in ("layers", "var"):
        for key in list(getattr(bare, name)):
            del getattr(bare, name)[key]
    prediction = hv.get.prediction(query)
    hv.tl.predict(bare, model)
    del bare.uns["spatial"]
    bare.obs_names = [f"<i>{name}</i>" for name in bare.obs_names]
    hv.pl.report(bare, tmp_path / "bare.html", genes=prediction.var_names[:3], title="<script>alert(1)</script>")
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("dialog", lambda dialog: pytest.fail("the title was run as a script"))
    page.goto((tmp_path / "bare.html").as_uri())
    page.wait_for_function("window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle")
    assert shows(page, "<script>alert(1)</script>")
    assert shows(page, "Section S4 has no H&E image to show.")
    assert page.get_by_label("Section").count() == 0 and page.locator(".bk-tab", has_text="Calibration").count() == 0
    assert page.get_by_label("Show").locator("option").all_inner_texts()[-1] == "upper bound (95 %)"
    assert page.get_by_label("Gene").locator("option").all_inner_texts() == list(prediction.var_names[:3])
    found = pointed_at(page, bare, bare.obs_names[4])
    gene = page.get_by_label("Gene").locator("option:checked").inner_text()
    assert found["spot"] == bare.obs_names[4]
    assert float(found["predicted mean"]) == pytest.approx(prediction[:, gene].X[4, 0], abs=STEP * 10)
    page.close()


def test_genes_one_can_trust_are_shown_best_first(browser, predicted, model, tmp_path):
    genes = model.registry["genes"]
    trust = pd.DataFrame(
        {"expected_pearson": np.linspace(0, 0.9, len(genes)), "share_of_ceiling": 0.5, "q_value": 0.0123}, index=genes
    )
    trust.attrs["expected on"] = "parts of the same sections"
    options = {**BY_DEFAULT, "confidence_level": 0.8, "title": "Trust"}
    content = collect(predicted, Keys("histovar"), model=model, trust=trust, **options)
    write_page(content, tmp_path / "trust.html")
    assert (
        "expected correlation, with its interval, on parts of the same sections"
        in (tmp_path / "trust.html").read_text()
    )
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.goto((tmp_path / "trust.html").as_uri())
    page.wait_for_selector(".slick-row")
    first = page.locator(".slick-row").first.locator(".slick-cell").all_inner_texts()
    assert first[0] == genes[-1] and first[-3:] == ["0.90", "0.50", "0.0123"]
    assert "upper bound (90 %)" in page.get_by_label("Show").locator("option").all_inner_texts()
    page.close()


def test_report_needs_no_network_and_is_small(report):
    html = report.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link)[^>]+(src|href)=", html)
    assert report.stat().st_size < 4e6


def test_wrong_reports_are_refused(predicted, model, model_of_values, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    with pytest.raises(ValueError, match="path: expected a file that ends in .html"):
        hv.pl.report(predicted, tmp_path / "report.pdf")
    with pytest.raises(KeyError, match="genes: .*'absent'.* are not among the"):
        hv.pl.report(predicted, path, genes=["absent"])
    with pytest.raises(ValueError, match="confidence_level: expected less than 1"):
        hv.pl.report(predicted, path, confidence_level=1)
    other = hv.TwoStageVARST(model.config)
    with pytest.raises(ValueError, match="model: expected a trained model"):
        hv.pl.report(predicted, path, other)
    other.registry = {**model.registry, "genes": model.registry["genes"][::-1]}
    with pytest.raises(ValueError, match="model: it has 30 genes, other than the 30 that were predicted"):
        hv.pl.report(predicted, path, other)
    other.registry = {**model.registry, "sections_stage2": ["S1"]}
    with pytest.raises(ValueError, match=r"model: it was trained on sections \['S1'\], unlike"):
        hv.pl.report(predicted, path, other)
    with pytest.raises(KeyError, match="no prediction 'other'"):
        hv.pl.report(predicted, path, key="other")
    monkeypatch.setattr("histovar.report.content.MOST_VALUES", 1000)
    with pytest.raises(ValueError, match="genes: 30 genes in 120 spots are too many.*name at most 8 genes"):
        hv.pl.report(predicted, path)
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(ImportError, match=r"needs bokeh, which is not installed: pip install 'histovar\[report\]'"):
        hv.pl.report(predicted, path)
    assert not path.exists()


def test_report_warns_of_novel_shallow_and_few(predicted, model, tmp_path):
    options = {**BY_DEFAULT, "confidence_level": 0.9, "title": "Cautions"}
    adata = predicted[predicted.obs["section"] == "S4"].copy()
    spots = adata.obsm["histovar_spots"].copy()
    adata.obsm["histovar_spots"] = spots * [0.001, 1, 1, 0] + [0, 0, 0, 0.3]
    small = adata[:20].copy()
    for data, count in ((adata, 60), (small, 20)):
        found = " ".join(collect(data, Keys("histovar"), model=model, trust=None, **options).cautions)
        assert "Section S4 looks unlike the training sections (novelty 0.30" in found
        assert "Section S4 is shallow" in found and "100 % of the genes" in found
        assert re.search(r"sequenced to a median of [\d,]+ counts in a spot, but \d+ are predicted", found)
        assert (f"few spots, {count}" in found) == (count < 32)
    adata.obsm["histovar_spots"] = spots * [1, 1, 1, 0]
    assert collect(adata, Keys("histovar"), model=model, trust=None, **options).cautions == []


def test_the_page_has_symbols_in_place_of_identifiers(predicted, model, tmp_path, histovar):
    genes = model.registry["genes"]
    adata = predicted.copy()
    adata.var["symbol"] = [f"Symbol{name.removeprefix('GENE')}" for name in adata.var_names]
    adata.var.loc[genes[0], "symbol"] = None
    path = tmp_path / "report.html"
    hv.pl.report(adata, path, model, gene_symbols="symbol")
    html = path.read_text(encoding="utf-8")
    named = [name for name in genes if re.search(rf'"{name}"', html)]
    assert named == genes[:1] and all(f'"{s}"' in html for s in adata.var.loc[genes[1:], "symbol"])
    assert not re.search(r"GENE\d", html.replace(genes[0], ""))
    adata.write_h5ad(tmp_path / "predicted.h5ad")
    symbol = adata.var.loc[genes[3], "symbol"]
    shell = ("report", "predicted.h5ad", "--gene", symbol, "--gene-symbols")
    assert histovar(*shell, "symbol")[0] == 0
    html = path.read_text(encoding="utf-8")
    assert f'"{symbol}"' in html and adata.var.loc[genes[4], "symbol"] not in html
    assert "--gene-symbols: no 'symbols' in var" in histovar(*shell, "symbols")[2]
    with pytest.raises(KeyError, match="genes: no gene of the predicted panel has the symbol"):
        hv.pl.report(adata, path, genes=genes[3], gene_symbols="symbol")
