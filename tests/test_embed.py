"""Embedding of the H&E around spots: which pixels, of which file, and what is refused."""

import logging
import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

import histovar as hv
from histovar.anndata_io.embeddings import record_of
from histovar.anndata_io.files import read_files
from histovar.anndata_io.spacing import microns_per_pixel

from .conftest import QUICK, small_config
from .test_errors import refuse

MPP = 0.5


class Grid(torch.nn.Module):
    """Toy encoder with known features: mean colours of the four quarters of a patch, 0 to 255."""

    def forward(self, images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images, 2)
        return 255 * pooled.flatten(1)


GRID = hv.encoders.Encoder(name="grid", module=Grid(), input_px=32, mean=(0, 0, 0), std=(1, 1, 1))


def quarters(pixels):
    """Features of a patch by Grid."""
    half = len(pixels) // 2
    parts = [[pixels[:half, :half], pixels[:half, half:]], [pixels[half:, :half], pixels[half:, half:]]]
    return np.array([[[part.mean((0, 1))[c] for part in row] for row in parts] for c in range(3)]).ravel()


@pytest.fixture(scope="module")
def pixels():
    """A smooth image in which no two places are alike."""
    y, x = np.mgrid[:300, :400]
    return np.stack([x * 0.6, y * 0.8, 127 + 100 * np.sin(x / 40) * np.cos(y / 30)], 2).astype(np.uint8)


@pytest.fixture
def png(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "slide.png")
    return tmp_path / "slide.png"


@pytest.fixture
def spots():
    place = 2 * np.random.default_rng(0).integers((20, 20), (180, 130), (12, 2)).astype(float)
    adata = ad.AnnData(obs=pd.DataFrame(index=[f"spot{i}" for i in range(12)]))
    adata.obsm["spatial"] = place
    return adata


def embed(adata, image, **options):
    hv.pp.embed(adata, GRID, image=image, show_progress_bar=False, **{"field_um": 16, "mpp": MPP, **options})
    return adata.obsm["X_grid_16um"] if "X_grid_16um" in adata.obsm else None


def expected(pixels, place, side=32):
    return np.array(
        [quarters(pixels[y - side // 2 : y + side // 2, x - side // 2 : x + side // 2]) for x, y in place.astype(int)]
    )


def test_patches_are_those_around_the_spots(spots, png, pixels):
    np.testing.assert_allclose(embed(spots, png), expected(pixels, spots.obsm["spatial"]), atol=1e-3)


def test_fields_in_microns(spots, png, pixels):
    """Twice the field, and half the resolution with coordinates to match, show the same tissue."""
    hv.pp.embed(spots, GRID, image=png, mpp=MPP, field_um=(16, 32), show_progress_bar=False)
    assert spots.obsm["X_grid_32um"].shape == (12, 12)
    np.testing.assert_allclose(spots.obsm["X_grid_32um"], expected(pixels, spots.obsm["spatial"], 64), atol=2)
    half = spots.copy()
    half.obsm["spatial"] = spots.obsm["spatial"] / 2
    Image.fromarray(pixels).reduce(2).save(png.with_name("half.png"))
    found = hv.pp.embed(
        half, GRID, image=png.with_name("half.png"), mpp=2 * MPP, field_um=32, key_added="X_half", copy=True,
        show_progress_bar=False,
    )  # fmt: skip
    np.testing.assert_allclose(found.obsm["X_half_32um"], spots.obsm["X_grid_32um"], atol=3)
    assert "X_half_32um" not in half.obsm


def write_pyramid(path, pixels, **options):
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(64, 64), photometric="rgb", subifds=0, **options)
        file.write(pixels[::2, ::2], tile=(64, 64), photometric="rgb", subfiletype=1)


@pytest.mark.parametrize("layout", ["pyramid", "strips", "channels first", "ome"])
def test_tiff_of_any_layout(spots, pixels, tmp_path, layout):
    path = tmp_path / ("slide.ome.tif" if layout == "ome" else "slide.tif")
    resolution = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}
    if layout == "pyramid":
        write_pyramid(path, pixels, **resolution)
    elif layout == "strips":
        tifffile.imwrite(path, pixels, photometric="rgb", rowsperstrip=16, **resolution)
    elif layout == "channels first":
        tifffile.imwrite(path, np.moveaxis(pixels, 2, 0), photometric="rgb", planarconfig="separate", **resolution)
    else:
        tifffile.imwrite(path, pixels, photometric="rgb", metadata={"PhysicalSizeX": MPP, "PhysicalSizeY": MPP})
    found = embed(spots, path, mpp=None)  # the file says it
    np.testing.assert_allclose(found, expected(pixels, spots.obsm["spatial"]), atol=1e-3)
    record = spots.uns["X_grid"]["embeddings"]["X_grid_16um"]
    assert record["mpp"] == pytest.approx(MPP) and record["encoder"] == "grid" and record["field_um"] == 16


def test_coarser_level_serves_a_wide_field(spots, pixels, tmp_path):
    write_pyramid(tmp_path / "slide.tif", pixels)
    hv.pp.embed(spots, GRID, image=tmp_path / "slide.tif", mpp=MPP, field_um=32, show_progress_bar=False)
    np.testing.assert_allclose(
        spots.obsm["X_grid_32um"], expected(pixels[::2, ::2], spots.obsm["spatial"] // 2), atol=2
    )


def test_edge_is_white_and_said_so(spots, png, caplog):
    spots.obsm["spatial"][0] = 0, 0
    with caplog.at_level(logging.WARNING):
        found = embed(spots, png)
    assert re.search(r"for 1 of 12 spots the field of 16 um reaches beyond the image; it is white there", caplog.text)
    upper_left, lower_right = found[0].reshape(3, 4)[:, 0], found[0].reshape(3, 4)[:, 3]
    np.testing.assert_allclose(upper_left, 255)
    assert (lower_right < 200).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mpp": None}, ValueError, r"mpp: microns per pixel of '.*slide.png' are unknown; pass mpp="),
        ({"field_um": 500}, ValueError, r"field_um: 500 um is larger than the whole image of the spots, 200 x 150 um"),
        ({"field_um": 3}, ValueError, r"field_um: 3 um is 6.0 pixels of the image"),
        ({"field_um": ()}, ValueError, "field_um"),
        ({"field_um": (16, 16)}, ValueError, "field_um: expected fields, each once"),
        ({"field_um": -1}, ValueError, "field_um"),
        ({"mpp": {"A": 0.5, "B": 0.5}}, ValueError, "mpp: given for .* but library_key= names no column"),
        ({"library_key": "section"}, KeyError, "library_key: no 'section' in obs"),
        ({"key_added": "spatial"}, ValueError, "key_added"),
    ],
)
def test_refused_before_any_work(spots, png, options, error, message):
    with pytest.raises(error, match=message) as caught:
        embed(spots, png, **options)
    assert "\n" not in str(caught.value)
    assert list(spots.obsm) == ["spatial"] and not spots.uns


def test_spots_outside_the_image(spots, png):
    spots.obsm["spatial"][:3] += 1000
    with pytest.raises(ValueError, match="image: 3 of 12 spots lie outside the 400 x 300 pixels of the image"):
        embed(spots, png)


def test_files_that_are_not_images(spots, pixels, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "text.svs").write_text("no image")
    (tmp_path / "text.tif").write_text("no image")
    for name in ("text.jpg", "text.svs", "text.tif"):
        with pytest.raises(ValueError, match=rf"image: '.*{name}' cannot be read as an image") as caught:
            embed(spots, tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="image: no file"):
        embed(spots, tmp_path / "nothing.svs")
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"image: '.*half.jpg' is damaged"):
        embed(spots, tmp_path / "half.jpg")
    assert list(spots.obsm) == ["spatial"]


@pytest.mark.parametrize(("module", "extra"), [("timm", "embed"), ("wsidata.reader", "wsi")])
def test_missing_extra_is_one_line(spots, tmp_path, monkeypatch, module, extra):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / "slide.svs").write_text("")
    Image.new("RGB", (400, 300)).save(tmp_path / "slide.png")
    name, encoder = ("slide.png", "dinov2_vits14") if extra == "embed" else ("slide.svs", GRID)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'histovar\[{extra}\]'") as caught:
        hv.pp.embed(spots, encoder, image=tmp_path / name, mpp=MPP, field_um=16, weights=None)
    assert "\n" not in str(caught.value)


def with_image(adata, pixels, scale=1.0, **factors):
    entry = {"images": {"hires": pixels}, "scalefactors": {"tissue_hires_scalef": scale, **factors}}
    adata.uns["spatial"] = {"A": entry}
    return adata


def test_image_in_uns(spots, pixels, caplog):
    """The object's own image, in its own resolution; one that is too coarse is warned of."""
    with_image(spots, pixels, microns_per_pixel=MPP)
    np.testing.assert_allclose(embed(spots, None, mpp=None), expected(pixels, spots.obsm["spatial"]), atol=1e-3)
    assert "pixels of the image" not in caplog.text
    coarse = with_image(spots.copy(), np.asarray(Image.fromarray(pixels).reduce(4)), 0.25)
    del coarse.obsm["X_grid_16um"]
    del coarse.uns["X_grid"]
    with pytest.raises(ValueError, match=r"mpp: microns per pixel of the image in uns\['spatial'\] are unknown"):
        embed(coarse, None, mpp=None)
    found = embed(coarse, None)
    np.testing.assert_allclose(found, expected(pixels, coarse.obsm["spatial"]), atol=12)
    assert "a field of 16 um is only 8 pixels of the image of the spots, but the encoder's input is 32" in caplog.text
    del coarse.uns["spatial"]
    with pytest.raises(ValueError, match=r"image: no image in uns\['spatial'\] .*; pass image="):
        embed(coarse, None)


def test_scale_that_was_given_counts_more_than_the_stored_one(spots, png, pixels):
    with_image(spots, pixels, microns_per_pixel=4 * MPP)
    assert microns_per_pixel(spots, None, None) == 4 * MPP
    embed(spots, png)
    assert microns_per_pixel(spots, None, None) == pytest.approx(MPP)


def test_file_that_is_noted_in_uns(spots, png, pixels):
    with_image(spots, np.full((3, 4, 3), 255, np.uint8), 0.01, microns_per_pixel=MPP)
    spots.uns["spatial"]["A"]["metadata"] = {"source_image_path": str(png)}
    np.testing.assert_allclose(embed(spots, None, mpp=None), expected(pixels, spots.obsm["spatial"]), atol=1e-3)


def test_sections_have_images_of_their_own(spots, png, pixels):
    spots.obs["section"] = ["A", "B"] * 6
    other = png.with_name("other.png")
    Image.fromarray(255 - pixels).save(other)
    with pytest.raises(ValueError, match=r"image: one file for the 2 sections \['A', 'B'\]"):
        embed(spots, png, library_key="section")
    with pytest.raises(KeyError, match=r"image: missing for sections \['B'\]"):
        embed(spots, {"A": png}, library_key="section")
    found = embed(spots, {"A": png, "B": other}, library_key="section", mpp={"A": MPP, "B": MPP})
    of_first = expected(pixels, spots.obsm["spatial"])
    np.testing.assert_allclose(found[::2], of_first[::2], atol=1e-3)
    np.testing.assert_allclose(found[1::2], 255 - of_first[1::2], atol=1e-3)


def test_image_of_spatialdata(spots, pixels):
    """Where spots lie in the image is known by the transformations of both."""
    spatialdata = pytest.importorskip("spatialdata")
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Scale, Sequence, Translation

    place = spots.obsm.pop("spatial")
    to_global = Sequence([Scale([2.0, 2.0], ("x", "y")), Translation([100.0, 50.0], ("x", "y"))])
    image = Image2DModel.parse(
        np.moveaxis(pixels, 2, 0), dims=("c", "y", "x"), scale_factors=[2], transformations={"global": to_global}
    )
    shapes = ShapesModel.parse(place * 2 + (100, 50), geometry=0, radius=1.0, index=np.arange(12) + 7)
    spots.obs["region"], spots.obs["instance"] = pd.Categorical(["circles"] * 12), np.arange(12)[::-1] + 7
    table = TableModel.parse(spots, region="circles", region_key="region", instance_key="instance")
    sdata = spatialdata.SpatialData(images={"he": image}, shapes={"circles": shapes}, tables={"table": table})
    hv.pp.embed(sdata, GRID, mpp=MPP, field_um=16, show_progress_bar=False)
    found = sdata.tables["table"].obsm["X_grid_16um"]
    np.testing.assert_allclose(found, expected(pixels, place[::-1]), atol=1e-3)
    del table.uns["spatialdata_attrs"]
    with pytest.raises(ValueError, match="image: the table annotates no element of the SpatialData"):
        hv.pp.embed(table_only(sdata, table), GRID, image="he", mpp=MPP, field_um=16)


def table_only(sdata, table):
    sdata.tables["table"] = table
    return sdata


def test_module_of_the_users_own(spots, png):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 5)

        def forward(self, images):
            assert not self.training
            return self.layer(images.mean((2, 3)))

    own = Own().train()
    hv.pp.embed(spots, own, image=png, mpp=MPP, field_um=16, show_progress_bar=False)
    assert spots.obsm["X_Own_16um"].shape == (12, 5) and own.training


def test_other_slots_are_left_alone(spots, png):
    spots.obsm["X_grid_16um"] = np.zeros((12, 2))
    with pytest.raises(ValueError, match=r"obsm\['X_grid_16um'\] was not written by histovar"):
        embed(spots, png)
    del spots.obsm["X_grid_16um"]
    embed(spots, png)
    hv.pp.embed(spots, GRID, image=png, mpp=MPP, field_um=32, show_progress_bar=False)
    assert set(spots.uns["X_grid"]["embeddings"]) == {"X_grid_16um", "X_grid_32um"}
    embed(spots, png)  # its own are replaced


@pytest.mark.usefixtures("brief")
def test_model_keeps_what_made_its_embeddings(prepared, query, png, tmp_path, caplog):
    adata = prepared.copy()
    rng = np.random.default_rng(0)
    for data in (adata, query):
        data.uns.pop("spatial", None)
        data.obsm["spatial"] = data.obsm["spatial"] / np.abs(data.obsm["spatial"]).max() * 200 + 50
    images = dict.fromkeys(adata.obs["section"].unique(), png)
    options = {"mpp": MPP, "library_key": "section", "show_progress_bar": False, "key_added": "X_h"}
    Image.fromarray(rng.integers(0, 255, (300, 400, 3)).astype(np.uint8)).resize((400, 300)).save(png)
    hv.pp.embed(adata, GRID, image=images, field_um=16, **options)
    rep = "X_h_16um"
    model = hv.tl.train(adata, use_rep=rep, library_key="section", config=small_config(), **QUICK)
    model.save(tmp_path / "model")
    model = hv.TwoStageVARST.load(tmp_path / "model")
    assert model.registry["embeddings"][0]["encoder"] == "grid"

    hv.pp.embed(query, GRID, image={"S4": png}, field_um=16, **options)
    query.write_h5ad(tmp_path / "query.h5ad")
    hv.tl.predict(ad.read_h5ad(tmp_path / "query.h5ad"), model)

    query.uns["X_h"]["embeddings"][rep]["mpp"] = 5.0
    hv.tl.predict(query, model, key_added="coarse")
    assert "from an image of 5 um per pixel, in training it was 0.5" in caplog.text
    for name, value in (("field_um", 32.0), ("encoder", "uni"), ("layers", "3"), ("mean", "0.5,0.5,0.5")):
        other = query.copy()
        other.uns["X_h"]["embeddings"][rep][name] = value
        with pytest.raises(ValueError, match=rf"use_rep: obsm\['{rep}'\] was made in another way .*{name}={value!r}"):
            hv.tl.predict(other, model, key_added="other")


def of_weights(weights, adata, image, **changes):
    """Embed by a linear map of the mean colours with these weights."""
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 16))
    module[2].weight.data[:] = weights
    encoder = hv.encoders.Encoder(name="colours", module=module, input_px=32, **changes)
    options = {"field_um": 16, "mpp": MPP, "library_key": "section", "show_progress_bar": False}
    torch.nn.init.zeros_(module[2].bias)
    return hv.pp.embed(adata, encoder, image=image, copy=True, **options)


def test_other_weights_under_the_same_name_are_refused(prepared, query, png):
    """A checkpoint is known by its values, not its name; what an earlier version recorded is not refused."""
    rep = "X_colours_16um"
    weights = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    for data in (adata := prepared.copy(), query):
        data.uns.pop("spatial", None)
        data.obsm["spatial"] = data.obsm["spatial"] / np.abs(data.obsm["spatial"]).max() * 200 + 50
    adata = of_weights(weights, adata, dict.fromkeys(adata.obs["section"].unique(), png))
    model = hv.tl.train(adata, use_rep=rep, library_key="section", config=small_config(), **QUICK)
    hv.tl.predict(of_weights(weights.half().float(), query, {"S4": png}), model)
    other = of_weights(weights + 0.01, query, {"S4": png})
    with pytest.raises(
        ValueError, match=rf"use_rep: obsm\['{rep}'\] was made in another way .*\(weights='\w+', in training"
    ):
        hv.tl.predict(other, model)
    with pytest.raises(ValueError, match=r"\(mean='0.5,0.5,0.5', in training '0.485,0.456,0.406'\)"):
        hv.tl.predict(of_weights(weights, query, {"S4": png}, mean=(0.5, 0.5, 0.5)), model)
    for fact in ("weights", "mean", "std", "precision"):
        del other.uns["X_colours"]["embeddings"][rep][fact]
    hv.tl.predict(other, model)

    part = adata[adata.obs["section"] == "S1"].copy()
    mixed = ad.concat([part, of_weights(weights + 1, query, {"S4": png})], uns_merge="unique", merge="same")
    with pytest.raises(
        ValueError, match=rf"obsm\['{rep}'\] holds embeddings that were made in different ways \(weights differ\)"
    ):
        hv.tl.train(mixed, use_rep=rep, library_key="section", config=small_config(), **QUICK)


def test_files_embedded_one_by_one_keep_their_scale(prepared, png, tmp_path, caplog):
    """They keep it if joined with uns_merge or by the command line, whatever the section names; else training warns."""
    adata = prepared.copy()
    del adata.uns["spatial"]
    adata.obsm["spatial"] = adata.obsm["spatial"] / adata.obsm["spatial"].max() * 200 + 50
    parts, files = [], [tmp_path / f"{name}.h5ad" for name in "abc"]
    for i, file in enumerate(files):
        part = adata[adata.obs["section"] == f"S{i + 1}"].copy()
        options = {"image": png, "field_um": 16, "mpp": 0.5 + 0.1 * i, "show_progress_bar": False}
        part.obs["section"] = f"S{i}/a"
        parts.append(hv.pp.embed(part, GRID, library_key="section", copy=True, **options))
        part.obs["section"] = "tissue"
        hv.pp.embed(part, GRID, library_key=None if i == 2 else "section", **options)
        part.write_h5ad(file)
    ad.concat(parts, merge="same", uns_merge="unique").write_h5ad(tmp_path / "joined.h5ad")
    joined = ad.read_h5ad(tmp_path / "joined.h5ad")
    for together in (joined, read_files(files)):
        sections = together.obs["section"].unique()
        scales = [microns_per_pixel(together, section, "section") for section in sections]
        assert len(sections) == 3 and scales == pytest.approx([0.5, 0.6, 0.7])

    options = {"use_rep": "X_grid_16um", "library_key": "section", **QUICK}
    model = hv.tl.train(joined, config=small_config(), **options)
    assert model.registry["spacing_um"] > 0 and "microns per pixel" not in caplog.text
    hv.tl.train_stage2(ad.concat(parts, merge="same"), model, **options)
    assert model.registry["spacing_um"] is None
    said = [line for line in caplog.messages if "microns per pixel of 3 of 3 sections" in line]
    assert len(said) == 1 and "anndata.concat(..., uns_merge='unique') keeps" in said[0]


def test_files_of_two_versions_keep_what_made_their_embeddings(prepared, png, tmp_path):
    """Joined objects have no version; encoder and scale are known all the same, and mixed encoders are refused."""
    adata = prepared.copy()
    del adata.uns["spatial"], adata.layers["lognorm"]
    adata.obsm["spatial"] = adata.obsm["spatial"] / adata.obsm["spatial"].max() * 200 + 50
    weights = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    parts = []
    for section, of in (("S1", weights), ("S2", weights), ("S3", weights + 1)):
        parts.append(of_weights(of, adata[adata.obs["section"] == section].copy(), {section: png}))
        parts[-1].uns["X_colours"]["version"] = f"0.9.{len(parts)}"
        parts[-1].write_h5ad(tmp_path / f"{section}.h5ad")
    files = [tmp_path / f"{section}.h5ad" for section in ("S1", "S2", "S3")]
    rep = "X_colours_16um"
    for alike in (ad.concat(parts[:2], merge="same", uns_merge="unique"), read_files(files[:2])):
        assert "version" not in alike.uns["X_colours"]
        assert record_of(alike, rep) == record_of(parts[0], rep)
        assert microns_per_pixel(alike, "S2", "section") == pytest.approx(MPP)
    options = {"use_rep": rep, "library_key": "section", "config": small_config(), **QUICK}
    for mixed in (ad.concat(parts, merge="same", uns_merge="unique"), read_files(files)):
        refuse(
            mixed,
            lambda a: hv.tl.train(a, checkpoint_dir=tmp_path / "checkpoints", **options),
            ValueError,
            rf"obsm\['{rep}'\] holds embeddings that were made in different ways \(weights differ\)",
        )
    assert not (tmp_path / "checkpoints").exists()
    again = of_weights(weights, mixed, dict.fromkeys(("S1", "S2", "S3"), png))
    assert record_of(again, rep)["weights"] == record_of(parts[0], rep)["weights"]


def cosines(found, reference):
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(reference, axis=1)
    return (found * reference).sum(1) / norms


def test_dinov2_as_in_the_shared_data(data_dir):
    """For the same spots, image and layers, embeddings equal those of an independent computation."""
    adata = ad.read_h5ad(data_dir / "her2st" / "paired.h5ad")
    adata = adata[adata.obs["section"] == "C3"][:6].copy()
    image = next((data_dir / "her2st/raw/data/ST-imgs/C/C3").glob("*.jpg"))
    weights = data_dir / "encoders" / "dinov2_vits14.safetensors"
    hv.pp.embed(adata, image=image, mpp=0.73, field_um=224 * 0.73, weights=weights, show_progress_bar=False)
    assert cosines(adata.obsm["X_dinov2_vits14_163.52um"], adata.obsm["X_dinov2"]).mean() > 0.999


def test_cells_of_xenium(data_dir, caplog):
    """Cells are spots as others; the image in the object is that of the section, at 1 um a pixel or so."""
    cells = ad.read_h5ad(data_dir / "xenium_lung.h5ad")
    with pytest.raises(ValueError, match="mpp: microns per pixel"):
        hv.pp.embed(cells, GRID, field_um=(16, 64), library_key="section")
    hv.pp.embed(cells, GRID, field_um=(16, 64), mpp=0.5, library_key="section", show_progress_bar=False)
    found = cells.obsm["X_grid_64um"]
    assert found.shape == (200, 12) and np.isfinite(found).all()
    assert len(np.unique(cells.obsm["X_grid_16um"], axis=0)) == 200
