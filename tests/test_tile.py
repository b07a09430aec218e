"""From a slide file to tiles, and on to embeddings, in Python and from the shell."""

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from scipy.ndimage import gaussian_filter

import histovar as hv

MPP = 1.0


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A slide with a square of something like tissue: 400 um a side, its corner at (300, 200) um."""
    rng = np.random.default_rng(0)
    pixels = np.full((1200, 1000, 3), 240, np.uint8)
    texture = np.stack([gaussian_filter(rng.normal(0, 1, (400, 400)), 1.5) for _ in range(3)], 2)
    pixels[200:600, 300:700] = np.clip((150, 90, 150) + 150 * texture, 0, 255)
    path = tmp_path_factory.mktemp("slides") / "tissue.tif"
    resolution = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", **resolution)
    return path


def test_centres_of_a_grid_over_the_tissue(slide):
    adata = hv.pp.tile(slide, spacing_um=50)
    place = adata.obsm["spatial"]
    assert adata.n_vars == 0 and set(adata.obs["section"]) == {"tissue"} and set(adata.obs["tissue"]) == {0}
    assert 55 <= adata.n_obs <= 100  # 64 cover the square
    assert (place > (290, 190)).all() and (place < (710, 610)).all()
    x = np.unique(place[:, 0])
    np.testing.assert_allclose(np.diff(x), 50)
    assert abs(place.mean(0) - (500, 400)).max() < 30
    entry = adata.uns["spatial"]["tissue"]
    assert entry["scalefactors"] == {
        "tissue_hires_scalef": 1.0,
        "spot_diameter_fullres": 50.0,
        "microns_per_pixel": pytest.approx(MPP),
    }
    assert entry["images"]["hires"].shape == (1200, 1000, 3)
    assert entry["metadata"]["source_image_path"] == str(slide.resolve())


def test_resolution_that_the_file_does_not_say(slide, tmp_path):
    pixels = tifffile.imread(slide)
    tifffile.imwrite(tmp_path / "unknown.tif", pixels, tile=(256, 256), photometric="rgb")
    with pytest.raises(ValueError, match=r"mpp: microns per pixel of '.*unknown.tif' are unknown; pass mpp="):
        hv.pp.tile(tmp_path / "unknown.tif")
    half = hv.pp.tile(tmp_path / "unknown.tif", mpp=0.5, spacing_um=50, section="A1", thumbnail_px=600)
    np.testing.assert_allclose(np.diff(np.unique(half.obsm["spatial"][:, 0])), 100)
    assert half.uns["spatial"]["A1"]["images"]["hires"].shape == (600, 500, 3)
    assert half.uns["spatial"]["A1"]["scalefactors"]["tissue_hires_scalef"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"spacing_um": 3},
            "spacing_um: 3 um are 3 pixels of 1 um, expected at least 8",
        ),
        ({"spacing_um": 5000}, "spacing_um: 5e"),
        ({"spacing_um": 0}, "spacing_um: expected more than 0"),
        ({"min_tissue": 0}, "min_tissue"),
    ],
)
def test_wrong_arguments(slide, options, message):
    with pytest.raises(ValueError, match=message):
        hv.pp.tile(slide, **options)
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir():
        assert slide not in [file.readlink() for file in descriptors.iterdir() if file.is_symlink()]


def test_files_that_cannot_be_tiled(tmp_path):
    (tmp_path / "broken.svs").write_bytes(b"II*\0" + b"x" * 100)
    with pytest.raises(ValueError, match=r"slide: '.*broken.svs' cannot be read as a slide") as caught:
        hv.pp.tile(tmp_path / "broken.svs")
    assert "\n" not in str(caught.value)
    tifffile.imwrite(tmp_path / "untiled.tif", np.full((300, 300, 3), 160, np.uint8), photometric="rgb")
    with pytest.raises(ValueError, match="untiled.tif' cannot be read as a slide .*; convert it to a pyramid: vips"):
        hv.pp.tile(tmp_path / "untiled.tif")
    with pytest.raises(FileNotFoundError, match="slide: no file"):
        hv.pp.tile(tmp_path / "nothing.svs")
    glass = np.full((1000, 1000, 3), 240, np.uint8)
    tifffile.imwrite(tmp_path / "glass.tif", glass, tile=(256, 256), photometric="rgb")
    with pytest.raises(ValueError, match="slide: no tiles"):
        hv.pp.tile(tmp_path / "glass.tif", mpp=1)
    with pytest.raises(TypeError, match="slide: expected the path of a slide or a WSIData"):
        hv.pp.tile(3)


def test_what_lazyslide_has_tiled(slide):
    """LazySlide's tiles are taken with their features; corners become centres."""
    lazyslide, wsidata = pytest.importorskip("lazyslide"), pytest.importorskip("wsidata")
    wsi = wsidata.open_wsi(slide, store=None)
    with pytest.raises(KeyError, match="tile_key: no 'tiles' in the slide's shapes"):
        hv.pp.tile(wsi)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazyslide.pp.find_tissues(wsi, method="entropy")
        lazyslide.pp.tile_tissues(wsi, 64)
        n_tiles = len(wsi["tiles"])
        values = np.arange(2.0 * n_tiles, dtype=np.float32).reshape(n_tiles, 2)
        wsidata.io.add_features(wsi, "uni_tiles", "tiles", values)
        lazyslide.pp.tile_tissues(wsi, 64, stride_px=32, key_added="big_tiles")
        other = np.zeros((len(wsi["big_tiles"]), 2), np.float32)
        wsidata.io.add_features(wsi, "uni_big_tiles", "big_tiles", other)
    adata = hv.pp.tile(wsi)
    corners = wsi["tiles"].bounds[["minx", "miny"]].to_numpy()
    np.testing.assert_allclose(adata.obsm["spatial"], corners + 32)
    np.testing.assert_allclose(adata.obsm["X_uni"], values)
    assert set(adata.obsm) == {"spatial", "X_uni"}
    np.testing.assert_allclose(hv.pp.tile(wsi, tile_key="big_tiles").obsm["X_uni"], other)
    assert adata.uns["spatial"]["tissue"]["scalefactors"]["spot_diameter_fullres"] == 64
    with pytest.raises(ValueError, match="spacing_um: not for a WSIData"):
        hv.pp.tile(wsi, spacing_um=50)


@pytest.fixture
def wsi(slide):
    """Tiled by LazySlide, with features as wide as those that the model was trained on."""
    lazyslide, wsidata = pytest.importorskip("lazyslide"), pytest.importorskip("wsidata")
    wsi = wsidata.open_wsi(slide, store=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazyslide.pp.find_tissues(wsi, method="entropy")
        lazyslide.pp.tile_tissues(wsi, 40)
        values = np.random.default_rng(0).normal(0, 1, (len(wsi["tiles"]), 16)).astype(np.float32)
        wsidata.io.add_features(wsi, "histology_tiles", "tiles", values)
    return wsi


def test_lazyslide_runs_a_model(wsi, model):
    """With the same result as by way of an AnnData, and back."""
    import lazyslide
    import wsidata

    lazyslide.tl.feature_prediction(wsi, hv.io.LazySlideModel(model), "histology", batch_size=10, device="cpu")
    table = wsi.tables["histovar_tiles"].to_df()
    query = hv.pp.tile(wsi)
    hv.tl.predict(query, model)
    predicted = hv.get.prediction(query)
    genes = model.registry["genes"]
    assert sorted(table) == sorted([*genes, *(f"{gene}_std" for gene in genes)])
    np.testing.assert_allclose(table[genes], predicted.to_df()[genes], atol=1e-5)
    np.testing.assert_allclose(table[[f"{gene}_std" for gene in genes]], predicted[:, genes].layers["std"], atol=1e-5)

    predicted.obs["region"] = pd.Categorical(["tiles"] * predicted.n_obs)
    at = {"region": "tiles", "region_key": "region", "instance_key": "tile_id"}
    wsidata.io.add_table(wsi, "back_tiles", predicted, **at)
    back = wsi.fetch.features_anndata("back", "tiles", tile_graph=False)
    np.testing.assert_allclose(back.X, table[genes], atol=1e-5)
    assert not any(p.is_inference() for p in model.parameters())  # or they could not be trained on any more


def test_lazyslide_mixed_precision_changes_nothing(model, query):
    """LazySlide's amp=True and a user's own autocast: predictions stay those of the precision that was asked for."""
    hv.tl.predict(query, model)
    expected = hv.get.prediction(query)
    with torch.autocast("cpu", torch.bfloat16):
        hv.tl.predict(query, model, key_added="mixed", n_samples=2)
        hv.tl.predict(query, model, key_added="bf16", precision="bf16")
        values = hv.io.LazySlideModel(model).predict(query.obsm["X_histology"], query.obsm["spatial"])
    np.testing.assert_array_equal(hv.get.prediction(query, key="mixed").X, expected.X)
    gene = expected.var_names[0]
    np.testing.assert_allclose(values[gene], expected[:, gene].X.ravel(), atol=1e-5)


def test_lazyslide_on_apple_predicts_on_the_cpu(model, query):
    """LazySlide picks MPS by itself, which has given NaN; histovar's default never does."""
    of_slide = hv.io.LazySlideModel(model).to("mps")
    values = of_slide.predict(query.obsm["X_histology"], query.obsm["spatial"])
    assert all(np.isfinite(of_gene).all() for of_gene in values.values())


def test_lazyslide_model_refuses_what_it_cannot_predict(wsi, loaded):
    model = hv.io.LazySlideModel(loaded)
    features = wsi.tables["histology_tiles"].X
    with pytest.raises(
        ValueError, match=r"features: shape \(\d+, 15\), expected \(n_tiles, 16\), the embeddings X_hist"
    ):
        model.predict(features[:, :15], np.zeros((len(features), 2)))
    with pytest.raises(ValueError, match="coords: the model needs the tiles' positions"):
        model.predict(features)
    loaded.registry["spacing_um"] = 50.0
    with pytest.raises(ValueError, match=r"mpp: .*give mpp=wsi.properties.mpp"):
        hv.io.LazySlideModel(loaded)
    loaded.registry["covariates"] = {"age": {"mean": 0.0, "std": 1.0}}
    with pytest.raises(ValueError, match=r"model: it needs covariates \['age'\], which LazySlide does not pass on"):
        hv.io.LazySlideModel(loaded, mpp=0.5)


def test_shell_from_slide_to_embeddings(histovar, slide, data_dir, tmp_path):
    code, out, error = histovar("tile", slide, "--spacing-um", 200, "-o", "tiles.h5ad")
    assert code == 0, error
    tiles = ad.read_h5ad(tmp_path / "tiles.h5ad")
    assert f"{tiles.n_obs} tiles written to tiles.h5ad" in out
    weights = data_dir / "encoders" / "dinov2_vits14.safetensors"
    embed = ("embed", "tiles.h5ad", "-o", "embedded.h5ad", "--field-um", 112, "--weights", weights, "--gpus", 0)
    code, _, error = histovar(*embed)
    assert code == 0, error
    embedded = ad.read_h5ad(tmp_path / "embedded.h5ad")
    assert embedded.obsm["X_dinov2_vits14_112um"].shape == (tiles.n_obs, 1536)
    assert embedded.uns["X_dinov2_vits14"]["embeddings"]["X_dinov2_vits14_112um"]["encoder"] == "dinov2_vits14"
    code, _, error = histovar("embed", "tiles.h5ad", "-o", "tiles.h5ad")
    assert code == 2 and "--out: 'tiles.h5ad' is the input" in error
    code, _, error = histovar("embed", "tiles.h5ad", "--encoder", "dino", "-o", "new.h5ad")
    assert code == 2 and "histovar: --encoder: expected one of ['conch'" in error


def test_tiles_of_the_shared_slides(data_dir):
    """A pink background is no tissue; microns per pixel are asked for if the file lacks them."""
    folder = data_dir / "slides"
    c3 = hv.pp.tile(folder / "her2st_C3.tif", spacing_um=200)
    spots = ad.read_h5ad(data_dir / "her2st" / "paired.h5ad")
    spots = spots.obsm["spatial"][(spots.obs["section"] == "C3").to_numpy()]
    assert 0.8 < c3.n_obs / len(spots) < 1.5
    low, high = spots.min(0) - 300, spots.max(0) + 300
    assert ((c3.obsm["spatial"] > low) & (c3.obsm["spatial"] < high)).all(1).mean() > 0.95
    with pytest.raises(ValueError, match="mpp: microns per pixel of .*TCGA"):
        hv.pp.tile(folder / "TCGA-CR-7395-01A-01-TS1.svs")
