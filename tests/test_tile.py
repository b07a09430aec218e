"""From a slide file to tiles, and on to embeddings, in Python and from the shell."""

import warnings

import anndata as ad
import numpy as np
import pytest
import tifffile
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
    with pytest.raises(ValueError, match=r"mpp: microns per pixel of '.*unknown.tif' are not known; pass mpp="):
        hv.pp.tile(tmp_path / "unknown.tif")
    half = hv.pp.tile(tmp_path / "unknown.tif", mpp=0.5, spacing_um=50, section="A1", thumbnail_px=600)
    np.testing.assert_allclose(np.diff(np.unique(half.obsm["spatial"][:, 0])), 100)
    assert half.uns["spatial"]["A1"]["images"]["hires"].shape == (600, 500, 3)
    assert half.uns["spatial"]["A1"]["scalefactors"]["tissue_hires_scalef"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing_um": 3}, "spacing_um: 3 um are 3 pixels of a slide of 1000 x 1200"),
        ({"spacing_um": 5000}, "spacing_um: 5e"),
        ({"spacing_um": 0}, "spacing_um: expected more than 0"),
        ({"min_tissue": 0}, "min_tissue"),
    ],
)
def test_wrong_arguments(slide, options, message):
    with pytest.raises(ValueError, match=message):
        hv.pp.tile(slide, **options)


def test_files_that_cannot_be_tiled(tmp_path):
    (tmp_path / "broken.svs").write_bytes(b"II*\0" + b"x" * 100)
    with pytest.raises(ValueError, match=r"slide: '.*broken.svs' cannot be read as a slide") as caught:
        hv.pp.tile(tmp_path / "broken.svs")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="slide: no file"):
        hv.pp.tile(tmp_path / "nothing.svs")
    glass = np.full((1000, 1000, 3), 240, np.uint8)
    tifffile.imwrite(tmp_path / "glass.tif", glass, tile=(256, 256), photometric="rgb")
    with pytest.raises(ValueError, match="slide: no tiles"):
        hv.pp.tile(tmp_path / "glass.tif", mpp=1)
    with pytest.raises(TypeError, match="slide: expected the path of a slide or a WSIData"):
        hv.pp.tile(3)


def test_what_lazyslide_has_tiled(slide):
    """Its tiles as they are, features with them, corners turned into centres."""
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
    adata = hv.pp.tile(wsi)
    corners = wsi["tiles"].bounds[["minx", "miny"]].to_numpy()
    np.testing.assert_allclose(adata.obsm["spatial"], corners + 32)
    np.testing.assert_allclose(adata.obsm["X_uni"], values)
    assert adata.uns["spatial"]["tissue"]["scalefactors"]["spot_diameter_fullres"] == 64
    with pytest.raises(ValueError, match="spacing_um: the WSIData is tiled already"):
        hv.pp.tile(wsi, spacing_um=50)


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
    assert code == 2 and "histovar: encoder: expected one of ['conch'" in error


def test_tiles_of_the_shared_slides(data_dir):
    """Pink glass is no tissue; microns per pixel that the file lacks are asked for."""
    folder = data_dir / "slides"
    c3 = hv.pp.tile(folder / "her2st_C3.tif", spacing_um=200)
    spots = ad.read_h5ad(data_dir / "her2st" / "paired.h5ad")
    spots = spots.obsm["spatial"][(spots.obs["section"] == "C3").to_numpy()]
    assert 0.8 < c3.n_obs / len(spots) < 1.5
    low, high = spots.min(0) - 300, spots.max(0) + 300
    assert ((c3.obsm["spatial"] > low) & (c3.obsm["spatial"] < high)).all(1).mean() > 0.95
    with pytest.raises(ValueError, match="mpp: microns per pixel of .*TCGA"):
        hv.pp.tile(folder / "TCGA-CR-7395-01A-01-TS1.svs")
