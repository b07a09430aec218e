"""Predictions for other programs, and annotations drawn there."""

import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
from geojson_pydantic import FeatureCollection
from spatialdata.transformations import get_transformation
from typer.testing import CliRunner

import histovar as hv
from histovar.cli import app


@pytest.fixture(scope="module")
def two_sections(simulated, model):
    adata = simulated[simulated.obs["section"].isin(["S3", "S4"])].copy()
    hv.tl.predict(adata, model, quantiles=(0.05, 0.95))
    return adata


def polygon(left, top, right, bottom, *holes):
    rings = [shapely.box(*corners).exterior for corners in ((left, top, right, bottom), *holes)]
    return shapely.Polygon(rings[0], rings[1:])


def write_annotations(path, *annotations):
    """As QuPath exports them."""
    features = [
        {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(shape)),
            "properties": {"objectType": "annotation", **({"classification": {"name": name}} if name else {}), **more},
        }
        for name, shape, more in annotations
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_spatialdata_has_layers_and_lies_on_its_image(two_sections, tmp_path):
    two_sections.obs["total counts"] = 1.0
    sdata = hv.get.spatialdata(two_sections)
    sdata.write(tmp_path / "s.zarr")
    sdata = sd.read_zarr(tmp_path / "s.zarr")
    table, prediction = sdata.tables["histovar"], hv.get.prediction(two_sections)
    assert sdata.attrs["histovar"]["units"] == "log1p(counts per 10,000)" and "total_counts" in table.obs
    np.testing.assert_array_equal(table.layers["mean"], prediction.X)
    np.testing.assert_array_equal(table.layers["std"], prediction.layers["std"])
    np.testing.assert_allclose(table.layers["lower"], prediction.layers["q0.05"], atol=1e-5)
    np.testing.assert_allclose(table.layers["upper"], prediction.layers["q0.95"], atol=1e-5)
    for section in ("S3", "S4"):
        spots = sdata.shapes[f"{section}_spots"]
        rows = two_sections.obs["section"] == section
        assert list(table.obs_names[table.obs["histovar_region"] == f"{section}_spots"]) == list(spots.index)
        np.testing.assert_array_equal(
            np.column_stack([spots.geometry.x, spots.geometry.y]), two_sections.obsm["spatial"][rows]
        )
        factors = two_sections.uns["spatial"][section]["scalefactors"]
        assert (spots["radius"] == factors["spot_diameter_fullres"] / 2).all()
        image = sdata.images[f"{section}_image"]
        scale = get_transformation(image, section).to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(np.diag(scale)[:2], 1 / factors["tissue_hires_scalef"])
        np.testing.assert_array_equal(
            image.transpose("y", "x", "c"), two_sections.uns["spatial"][section]["images"]["hires"]
        )
        assert set(get_transformation(spots, get_all=True)) == {section}
    with pytest.raises(ValueError, match="library_key: the table of a SpatialData"):
        hv.get.spatialdata(sdata, library_key="section", table_name="histovar")


def test_spatialdata_keeps_elements_and_regions_of_its_own(query, model):
    circles = sd.models.ShapesModel.parse(query.obsm["spatial"], geometry=0, radius=20, index=query.obs_names)
    query.obs["region"], query.obs["id"] = pd.Categorical(["circles"] * query.n_obs), query.obs_names
    table = sd.models.TableModel.parse(query, region="circles", region_key="region", instance_key="id")
    sdata = sd.SpatialData(shapes={"circles": circles}, tables={"counts": table})
    hv.tl.predict(sdata, model)
    result = hv.get.spatialdata(sdata)
    assert list(result.tables) == ["histovar"] and result.shapes["circles"] is sdata.shapes["circles"]
    element, matched = sd.join_spatialelement_table(
        sdata=result, spatial_element_names="circles", table_name="histovar"
    )
    assert len(element["circles"]) == len(matched) == query.n_obs and "upper" in matched.layers


def test_one_section_without_a_name_is_global(query, model):
    hv.tl.predict(query, model, library_key=None)
    query.uns["histovar"]["params"]["library_key"] = ""
    query.uns["spatial"] = {"S4": query.uns["spatial"]["S4"]}
    sdata = hv.get.spatialdata(query)
    assert list(sdata.shapes) == ["spots"] and list(sdata.images) == ["image"]
    assert sdata.coordinate_systems == ["global"]


def test_geojson_is_valid_and_reads_back_with_its_values(two_sections, tmp_path):
    prediction = hv.get.prediction(two_sections)
    genes = list(prediction.var_names[:2])
    path = tmp_path / "S4.geojson"
    hv.io.write_geojson(two_sections, path, genes=genes, section="S4")
    FeatureCollection.model_validate_json(path.read_text())
    table = gpd.read_file(path)
    rows = (two_sections.obs["section"] == "S4").to_numpy()
    place = two_sections.obsm["spatial"][rows]
    diameter = two_sections.uns["spatial"]["S4"]["scalefactors"]["spot_diameter_fullres"]
    assert list(table["name"]) == list(two_sections.obs_names[rows]) and (table["objectType"] == "detection").all()
    assert table["id"].is_unique
    centres = table.geometry.centroid
    np.testing.assert_allclose(np.column_stack([centres.x, centres.y]), place, atol=0.02)
    np.testing.assert_allclose(table.geometry.area, np.pi * diameter**2 / 4, rtol=0.01)
    assert table.geometry.exterior.is_ccw.all()
    measurements = pd.DataFrame([m if isinstance(m, dict) else json.loads(m) for m in table["measurements"]])
    assert list(measurements) == [f"{g} {what}" for g in genes for what in ("mean", "lower", "upper")]
    for gene in genes:
        of_gene = prediction[rows, gene]
        np.testing.assert_allclose(measurements[f"{gene} mean"], of_gene.X[:, 0], rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(measurements[f"{gene} lower"], of_gene.layers["q0.05"][:, 0], rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(measurements[f"{gene} upper"], of_gene.layers["q0.95"][:, 0], rtol=1e-4, atol=1e-8)
    hv.io.write_geojson(two_sections, path, genes=genes[0], section="S4", shape="square", diameter=30)
    assert np.allclose(gpd.read_file(path).geometry.area, 900)


def test_wrong_geojson_is_refused(two_sections, tmp_path):
    path = tmp_path / "out.geojson"
    with pytest.raises(ValueError, match=r"section: the object has sections \['S3', 'S4'\]"):
        hv.io.write_geojson(two_sections, path)
    with pytest.raises(ValueError, match="section: no section 'S9'"):
        hv.io.write_geojson(two_sections, path, section="S9")
    with pytest.raises(KeyError, match="genes: .*'absent'"):
        hv.io.write_geojson(two_sections, path, section="S4", genes="absent")
    with pytest.raises(ValueError, match="shape: expected 'circle' or 'square'"):
        hv.io.write_geojson(two_sections, path, section="S4", shape="star")
    assert not path.exists()


def test_annotations_become_a_column(query, tmp_path):
    place = query.obsm["spatial"] = np.array([[x, y] for x in range(10) for y in range(6)], dtype=float) * 10
    tumour = shapely.MultiPolygon([polygon(0, 0, 35, 55, (18, 18, 22, 22)), polygon(80, 0, 95, 5)])
    path = write_annotations(
        tmp_path / "drawn.geojson",
        ("Immune cells", polygon(5, 5, 15, 15), {}),
        ("Tumor", tumour, {}),
        (None, polygon(60, 0, 64, 60), {"name": "fold"}),
        (None, polygon(50, 50, 54, 60), {}),
        ("Cell", polygon(0, 0, 99, 99), {"objectType": "detection"}),
        ("Stroma", shapely.Point(70, 50), {}),
    )
    hv.io.read_geojson(query, path)
    found = query.obs["annotation"].astype(object).set_axis(map(tuple, place))
    assert list(query.obs["annotation"].cat.categories) == ["Immune cells", "Tumor", "fold", "unclassified"]
    assert found[10, 10] == "Immune cells"  # within the tumour: the smaller counts
    assert found[0, 0] == "Tumor" and found[80, 0] == "Tumor"  # the edge, and the second part
    assert pd.isna(found[20, 20])  # a hole
    assert found[60, 30] == "fold" and found[50, 50] == "unclassified"
    assert pd.isna(found[70, 50]) and pd.isna(found[40, 0])
    assert (
        hv.io.read_geojson(query, path, key_added="other", copy=True).obs["other"].notna().sum() == found.notna().sum()
    )
    assert "other" not in query.obs


def test_annotations_of_each_slide_are_kept(simulated, tmp_path):
    adata = simulated.copy()
    box = shapely.box(*adata.obsm["spatial"].min(0) - 1, *adata.obsm["spatial"].max(0) + 1)
    options = {"library_key": "section", "key_added": "region_drawn"}
    with pytest.raises(ValueError, match="section: the object has sections"):
        hv.io.read_geojson(adata, write_annotations(tmp_path / "a.geojson", ("Tumor", box, {})), **options)
    hv.io.read_geojson(adata, tmp_path / "a.geojson", section="S1", **options)
    hv.io.read_geojson(adata, write_annotations(tmp_path / "b.geojson", ("Stroma", box, {})), section="S2", **options)
    counts = adata.obs.groupby("section", observed=True)["region_drawn"].agg(lambda x: set(x.dropna()))
    assert counts.to_dict() == {"S1": {"Tumor"}, "S2": {"Stroma"}, "S3": set(), "S4": set()}


def test_wrong_annotations_are_refused(query, tmp_path, caplog):
    before = query.copy()
    far = write_annotations(tmp_path / "far.geojson", ("Tumor", polygon(1e6, 1e6, 2e6, 2e6), {}))
    with pytest.raises(ValueError, match="path: the annotations of .* do not overlap the spots"):
        hv.io.read_geojson(query, far)
    points = write_annotations(tmp_path / "points.geojson", ("Tumor", shapely.Point(1, 1), {}))
    with pytest.raises(ValueError, match="has no annotation with an area"):
        hv.io.read_geojson(query, points)
    with pytest.raises(FileNotFoundError, match="path: no file"):
        hv.io.read_geojson(query, tmp_path / "absent.geojson")
    for text in ("", "{}", "[1]", '{"type": "Feature", "geometry": {"type": "Polygon"}}', '{"type": "Topology"}'):
        (tmp_path / "broken.geojson").write_text(text)
        with pytest.raises(ValueError, match=r"path: .*broken\.geojson' (is not GeoJSON|has no annotation)"):
            hv.io.read_geojson(query, tmp_path / "broken.geojson")
    everywhere = write_annotations(tmp_path / "all.geojson", ("Tumor", polygon(-1, -1, 1e6, 1e6), {}))
    with pytest.raises(ValueError, match=r"key_added: obs\['region'\] was not written by histovar"):
        hv.io.read_geojson(query, everywhere, key_added="region")
    pd.testing.assert_frame_equal(query.obs, before.obs)
    assert query.uns.keys() == before.uns.keys()


def test_own_export_is_no_annotation(two_sections, tmp_path):
    hv.io.write_geojson(
        two_sections, tmp_path / "S4.geojson", genes=two_sections.uns["histovar"]["genes"][0], section="S4"
    )
    with pytest.raises(ValueError, match="has no annotation with an area"):
        hv.io.read_geojson(two_sections, tmp_path / "S4.geojson", section="S4", library_key="section")


def test_commands_write_report_and_exports(two_sections, model, tmp_path):
    predicted, gene = tmp_path / "predicted.h5ad", str(two_sections.uns["histovar"]["genes"][0])
    two_sections.write_h5ad(predicted)
    model.save(tmp_path / "model")
    run = CliRunner()
    report, geojson, store = (str(tmp_path / name) for name in ("report.html", "S4.geojson", "S4.zarr"))
    for arguments in (
        ["report", str(predicted), "--model", str(tmp_path / "model"), "--out", report, "--gene", gene],
        ["export", str(predicted), "--to", "geojson", "--out", geojson, "--section", "S4", "--gene", gene],
        ["export", str(predicted), "--to", "spatialdata", "--out", store],
    ):
        for _ in range(2):  # what is histovar's own is replaced
            done = run.invoke(app, arguments)
            assert done.exit_code == 0 and arguments[arguments.index("--out") + 1] in done.stdout, done.exception
    hv.io.write_geojson(two_sections, tmp_path / "by_python.geojson", genes=gene, section="S4")
    assert (tmp_path / "by_python.geojson").read_bytes() == (tmp_path / "S4.geojson").read_bytes()
    assert sd.read_zarr(store).tables["histovar"].layers.keys() >= {"mean", "std", "lower", "upper"}
    (tmp_path / "mine.html").write_text("<html></html>")
    refused = run.invoke(app, ["report", str(predicted), "--out", str(tmp_path / "mine.html")])
    assert "is not a report of histovar" in str(refused.exception)
    refused = run.invoke(app, ["export", str(predicted), "--to", "spatialdata", "--gene", gene, "--out", store])
    assert "--gene is for --to geojson" in str(refused.exception)
