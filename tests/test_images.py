"""Which tissue image is drawn under the spots, in which colours, and how large the spots are."""

import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

import histovar as hv
from histovar.anndata_io.images import scale_factors, section_image, spot_diameter, to_rgb

from .conftest import QUICK, small_config

LOGGER = "histovar.anndata_io.images"


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def all_predicted(simulated, model):
    adata = simulated.copy()
    hv.tl.predict(adata, model)
    return adata


@pytest.fixture
def sections(all_predicted):
    """Four sections, S1 to S4, each with an image."""
    return all_predicted.copy()


@pytest.fixture
def one(all_predicted):
    """Section S4 alone, with one image, of that name."""
    adata = all_predicted[all_predicted.obs["section"] == "S4"].copy()
    adata.uns["spatial"] = {"S4": copy_entry(adata.uns["spatial"]["S4"])}
    return adata


@pytest.fixture
def gene(model):
    return model.registry["genes"][0]


def copy_entry(entry):
    return {"images": dict(entry["images"]), "scalefactors": dict(entry["scalefactors"])}


def pixels_of(axes):
    """Pixels drawn under the spots, (height, width, 3); None if there are none."""
    shown = [ax.images for ax in axes.flat]
    assert len({len(images) for images in shown}) == 1
    return np.asarray(shown[0][0].get_array()) if shown[0] else None


def spots_of(ax):
    """Centres, diameters and values of the spots."""
    (collection,) = [c for c in ax.collections if c.get_array() is not None]
    boxes = [path.get_extents() for path in collection.get_paths()]
    centres = np.array([((b.x0 + b.x1) / 2, (b.y0 + b.y1) / 2) for b in boxes])
    return centres, np.array([b.width for b in boxes]), np.asarray(collection.get_array())


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == LOGGER and r.levelname == "WARNING"]


def assert_no_image(adata, caplog, match, **options):
    caplog.clear()
    gene = adata.uns["histovar"]["genes"][0]
    axes = hv.pl.spatial(adata, gene, **options)
    assert pixels_of(axes) is None
    (message,) = warnings_of(caplog)
    assert match in message and "\n" not in message
    centres, diameters, values = spots_of(axes[0, 0])
    assert len(values) == 60 and (diameters > 0).all()
    return axes


# Whose image


def test_each_section_has_its_own_image(sections, gene, caplog):
    for name in ("S1", "S3"):
        drawn = pixels_of(hv.pl.spatial(sections, gene, section=name))
        np.testing.assert_array_equal(drawn, sections.uns["spatial"][name]["images"]["hires"])
    assert not warnings_of(caplog)


def test_the_image_of_another_section_is_not_drawn(sections, gene, caplog):
    sections.uns["spatial"] = {"S1": sections.uns["spatial"]["S1"]}
    assert pixels_of(hv.pl.spatial(sections, gene, section="S1")) is not None
    assert_no_image(sections, caplog, "'S2'", section="S2")
    sections.uns["spatial"] = {"library": sections.uns["spatial"]["S1"]}
    assert_no_image(sections, caplog, "none has the section's name", section="S1")


def test_the_only_image_serves_an_object_of_one_section(one, gene, caplog):
    image = one.uns["spatial"].pop("S4")
    one.uns["spatial"]["V1_Human_Lymph_Node"] = image
    np.testing.assert_array_equal(pixels_of(hv.pl.spatial(one, gene)), image["images"]["hires"])
    one.uns["spatial"]["another"] = image
    assert_no_image(one, caplog, "V1_Human_Lymph_Node")


def test_the_only_image_is_not_drawn_if_it_is_another_sections(one, caplog):
    one.uns["spatial"] = {"S1": one.uns["spatial"]["S4"]}
    one.obs["section"] = pd.Categorical(one.obs["section"], categories=["S1", "S4"])
    assert_no_image(one, caplog, "the only image is that of section 'S1'")


def test_without_a_section_column_the_only_image_is_drawn(one, gene, model, caplog):
    del one.obs["section"]
    hv.tl.predict(one, model)
    assert pixels_of(hv.pl.spatial(one, gene)) is not None
    one.uns["spatial"]["S5"] = copy_entry(one.uns["spatial"]["S4"])
    one.uns["spatial"]["S5"]["images"]["hires"] = np.full((800, 800, 3), 7, np.uint8)
    assert_no_image(one, caplog, "no section is named")
    assert (pixels_of(hv.pl.spatial(one, gene, section="S5")) == 7).all()


def test_an_image_elsewhere_than_the_spots_is_not_drawn(one, gene, caplog):
    one.uns["spatial"]["S4"]["scalefactors"]["tissue_hires_scalef"] = 10
    assert_no_image(one, caplog, "are outside its 800 x 800 pixels")
    one.uns["spatial"]["S4"]["images"]["lowres"] = np.full((80, 80, 3), 9, np.uint8)
    extent = one.obsm["spatial"].max()
    one.uns["spatial"]["S4"]["scalefactors"]["tissue_lowres_scalef"] = 75 / extent
    assert (pixels_of(hv.pl.spatial(one, gene)) == 9).all()


def test_objects_without_images_are_drawn_without_a_warning(one, gene, caplog):
    one.uns["spatial"] = {}
    assert pixels_of(hv.pl.spatial(one, gene)) is None
    del one.uns["spatial"]
    assert pixels_of(hv.pl.spatial(one, gene)) is None
    assert not warnings_of(caplog)


# What is stored


def test_the_best_resolution_is_chosen(one, gene):
    entry = one.uns["spatial"]["S4"]
    full = entry["images"].pop("hires")
    scale = entry["scalefactors"].pop("tissue_hires_scalef")
    names = ["mine", "lowres", "downscaled_fullres", "hires"]
    for i, name in enumerate(names):
        entry["images"][name] = np.full((full.shape[0] // 2, full.shape[1] // 2, 3), i, np.uint8)
        entry["scalefactors"][f"tissue_{name}_scalef"] = scale / 2
        axes = hv.pl.spatial(one, gene)
        assert (pixels_of(axes) == i).all(), name
        centres, diameters, _ = spots_of(axes[0, 0])
        np.testing.assert_allclose(centres, one.obsm["spatial"] * scale / 2)
        np.testing.assert_allclose(diameters, 1.4 * 55 * scale / 2)
        plt.close("all")


def test_an_unusable_resolution_gives_way_to_the_next(one, gene):
    entry = one.uns["spatial"]["S4"]
    entry["images"]["lowres"] = np.full((800, 800, 3), 5, np.uint8)
    entry["scalefactors"]["tissue_lowres_scalef"] = entry["scalefactors"]["tissue_hires_scalef"]
    entry["scalefactors"]["tissue_hires_scalef"] = np.nan
    assert (pixels_of(hv.pl.spatial(one, gene)) == 5).all()


@pytest.mark.parametrize("stored", [None, np.nan, -1.0, "55", [1, 2]], ids=str)
def test_without_a_spot_diameter_spots_do_not_touch(one, gene, stored):
    factors = one.uns["spatial"]["S4"]["scalefactors"]
    factors["spot_diameter_fullres"] = stored
    axes = hv.pl.spatial(one, gene, size=1)
    assert pixels_of(axes) is not None
    np.testing.assert_allclose(spots_of(axes[0, 0])[1], 55 * factors["tissue_hires_scalef"], rtol=1e-6)


@pytest.mark.parametrize(
    "factor", [None, np.nan, np.inf, 0, -0.1, "0.1", True, [0.1, 0.1], 10**400], ids=lambda v: str(v)[:9]
)
def test_scale_factors_that_are_no_positive_numbers(one, caplog, factor):
    one.uns["spatial"]["S4"]["scalefactors"]["tissue_hires_scalef"] = factor
    assert_no_image(one, caplog, "no positive number 'tissue_hires_scalef'")


@pytest.mark.parametrize("key", ["scalefactors", "images"])
@pytest.mark.parametrize("value", [None, "text", 3, [], {}], ids=str)
def test_entries_that_lack_images_or_scale_factors(one, caplog, key, value):
    one.uns["spatial"]["S4"][key] = value
    assert_no_image(one, caplog, "scalef" if key == "scalefactors" else "images")
    del one.uns["spatial"]["S4"][key]
    assert_no_image(one, caplog, f"its {key!r} are NoneType")


@pytest.mark.parametrize("value", [None, "text", 3, ["S4"]], ids=str)
def test_slots_that_are_no_dictionaries(one, caplog, value):
    one.uns["spatial"] = {"S4": value}
    assert_no_image(one, caplog, "entry 'S4'")
    one.uns["spatial"] = value
    assert_no_image(one, caplog, "expected a dictionary")


def with_nan(image):
    image = image.astype(np.float32)
    image[0, 0, 0] = np.nan
    return image


def rgba(image):
    opacity = np.full((*image.shape[:2], 1), 255, np.uint8)
    return np.concatenate([image, opacity], axis=2)


FORMATS = {
    "fractions": lambda i: i / 255,
    "fractions with overshoot": lambda i: i / 255 * 1.02,
    "half precision": lambda i: (i / 255).astype(np.float16),
    "floats to 255": lambda i: i.astype(np.float64),
    "floats to 255 with NaN": with_nan,
    "fractions with NaN": lambda i: with_nan(i / 255),
    "int64": lambda i: i.astype(np.int64),
    "12 bits": lambda i: i.astype(np.uint16) * 16,
    "16 bits": lambda i: i.astype(np.uint16) * 257,
    "floats to 65535": lambda i: i.astype(np.float32) * 257,
    "channels first": lambda i: np.moveaxis(i, 2, 0),
    "opaque RGBA": rgba,
    "opaque RGBA, channels first": lambda i: np.moveaxis(rgba(i), 2, 0),
    "RGBA of fractions": lambda i: rgba(i) / 255,
    "colours to 255, opacity to 1": lambda i: np.concatenate([i.astype(float), np.ones((800, 800, 1))], axis=2),
    "dask": lambda i: da.from_array(i, chunks=(300, 300, 3)),
    "zarr": lambda i: zarr.array(i),
    "xarray": lambda i: xr.DataArray(np.moveaxis(i, 2, 0), dims=("c", "y", "x")),
    "dask in xarray, 16 bits": lambda i: xr.DataArray(da.from_array(i.astype(np.uint16) * 257), dims=("y", "x", "c")),
    "list": lambda i: i.tolist(),
}


@pytest.mark.parametrize("convert", FORMATS.values(), ids=FORMATS)
def test_the_same_image_in_any_format_has_the_same_colours(one, gene, convert, caplog):
    images = one.uns["spatial"]["S4"]["images"]
    expected = images["hires"].copy()
    expected[10:20, 10:20] = 0
    expected[20:30, 20:30] = 255
    images["hires"] = convert(expected)
    drawn = pixels_of(hv.pl.spatial(one, gene))
    assert drawn.dtype == np.uint8 and drawn.shape == (800, 800, 3)
    np.testing.assert_allclose(drawn[1:].astype(int), expected[1:], atol=6)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("shape", [(800, 800), (800, 800, 1), (1, 800, 800)], ids=str)
def test_grey_images_are_drawn_grey(one, gene, shape):
    grey = np.arange(800 * 800, dtype=np.uint32).reshape(800, 800).astype(np.uint8)
    one.uns["spatial"]["S4"]["images"]["hires"] = grey.reshape(shape)
    drawn = pixels_of(hv.pl.spatial(one, gene))
    for channel in range(3):
        np.testing.assert_array_equal(drawn[..., channel], grey)


def test_transparent_and_missing_pixels_are_white():
    image = np.zeros((2, 3, 4), np.uint8)
    image[..., 3] = [255, 128, 0]
    np.testing.assert_array_equal(to_rgb(image)[0, :, 0], [0, 127, 255])
    image = np.full((2, 2, 3), 0.5)
    image[0, 0] = np.nan
    np.testing.assert_array_equal(to_rgb(image)[..., 1], [[255, 128], [128, 128]])


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (None, "shape ()"),
        ("tissue.png", "shape ()"),
        (np.zeros((800, 800, 2), np.uint8), "shape (800, 800, 2)"),
        (np.zeros((800, 800, 30), np.uint8), "shape (800, 800, 30)"),
        (np.zeros((1, 1, 800, 800), np.uint8), "shape"),
        (np.zeros((0, 800, 3), np.uint8), "shape (0, 800, 3)"),
        (np.zeros((800, 800, 3), bool), "data type bool"),
        (np.zeros((800, 800, 3), complex), "data type complex"),
        (np.full((800, 800, 3), "a"), "data type <U1"),
        (np.full((800, 800, 3), np.nan), "NaN"),
        (np.full((800, 800, 3), -1), "values from -1 to -1"),
        (np.random.default_rng(0).normal(size=(800, 800, 3)), "are not those of an image"),
        (np.full((800, 800, 3), 1e6), "are not those of an image"),
        ([[1, 2], [3]], "cannot be read"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_what_is_no_image_is_not_drawn(one, caplog, image, match):
    one.uns["spatial"]["S4"]["images"]["hires"] = image
    assert_no_image(one, caplog, match)


def test_an_8_bit_image_in_memory_is_not_copied(one):
    image = np.zeros((1200, 1500, 3), np.uint8)
    entry = {"images": {"hires": image}, "scalefactors": {"tissue_hires_scalef": 1}}
    found = section_image({"S4": entry}, "S4", one.obs["section"], one.obsm["spatial"])
    assert np.shares_memory(found["images"]["hires"], image) and found["images"]["hires"].shape == image.shape
    assert found["scalefactors"]["tissue_hires_scalef"] == 1 and entry["images"]["hires"] is image


@pytest.mark.parametrize("store", [np.asarray, da.from_array, zarr.array, xr.DataArray])
def test_a_full_resolution_image_is_drawn_with_fewer_pixels(one, store):
    place = one.obsm["spatial"] * 6
    side = int(place.max()) + 200
    fade = np.linspace(0, 255, side)
    image = np.empty((side, side, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = fade, fade[:, None], 100
    entry = {"images": {"hires": store(image)}, "scalefactors": {"tissue_hires_scalef": 1}}
    found = section_image({"S4": entry}, "S4", one.obs["section"], place)
    pixels, scale = found["images"]["hires"], found["scalefactors"]["tissue_hires_scalef"]
    assert max(pixels.shape) <= side // 2 + 1
    assert np.shares_memory(pixels, image) or store in (da.from_array, zarr.array)
    under, drawn = (
        pixel[tuple((place * factor).astype(int).T[::-1])] for pixel, factor in ((image, 1), (pixels, scale))
    )
    np.testing.assert_allclose(drawn.astype(int), under, atol=1)


def test_nothing_of_the_object_is_changed(one, gene):
    before = copy_entry(one.uns["spatial"]["S4"])
    hires = before["images"]["hires"].copy()
    hv.pl.spatial(one, gene)
    after = one.uns["spatial"]["S4"]
    assert after["scalefactors"] == before["scalefactors"] and list(after["images"]) == ["hires"]
    np.testing.assert_array_equal(after["images"]["hires"], hires)


# Sections and coordinates


@pytest.mark.parametrize("as_given", [int, np.int64, str])
def test_sections_may_be_numbers(sections, gene, as_given):
    numbers = sections.obs["section"].astype(str).str[1:].astype(int) - 1
    sections.obs["section"] = numbers
    sections.uns["spatial"] = {int(name[1:]) - 1: image for name, image in sections.uns["spatial"].items()}
    expected = hv.get.prediction(sections)[:, gene].X[:, 0]
    for number in (0, 2):
        axes = hv.pl.spatial(sections, gene, section=as_given(number))
        np.testing.assert_allclose(spots_of(axes[0, 1])[2], expected[numbers == number])
        np.testing.assert_array_equal(pixels_of(axes), sections.uns["spatial"][number]["images"]["hires"])
    with pytest.raises(ValueError, match="section: no section '7'"):
        hv.pl.spatial(sections, gene, section=7)


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ("", ValueError, "section: expected text that is not empty"),
        (0, ValueError, "section: no section '0'"),
        (False, TypeError, "section: expected text or a whole number or None, got False"),
    ],
)
def test_zero_false_and_empty_text_are_not_taken_for_no_section(one, gene, section, error, message):
    with pytest.raises(error, match=message):
        hv.pl.spatial(one, gene, section=section)


def test_an_empty_library_key_is_no_default(one, gene):
    with pytest.raises(ValueError, match="library_key: expected text that is not empty, got ''"):
        hv.pl.spatial(one, gene, library_key="")


def test_coordinates_must_be_there_and_finite(one, gene):
    one.obsm["spatial"][3, 1] = np.nan
    with pytest.raises(ValueError, match="spatial_key: .* NaN or infinite values in 1 rows, first at row 3"):
        hv.pl.spatial(one, gene)
    del one.obsm["spatial"]
    with pytest.raises(KeyError, match="spatial_key: no 'spatial' in obsm"):
        hv.pl.spatial(one, gene)
    assert not plt.get_fignums()


def test_coordinates_may_be_a_frame_of_two_columns(one, gene):
    place = one.obsm["spatial"]
    one.obsm["spatial"] = pd.DataFrame({"x": place[:, 0], "y": place[:, 1]}, one.obs_names)
    axes = hv.pl.spatial(one, gene)
    scale = one.uns["spatial"]["S4"]["scalefactors"]["tissue_hires_scalef"]
    np.testing.assert_allclose(spots_of(axes[0, 0])[0], place * scale)
    one.obsm["spatial"] = one.obsm["spatial"].assign(z=0.0)
    with pytest.raises(ValueError, match=r"has shape \(60, 3\), expected \(60, 2\)"):
        hv.pl.spatial(one, gene)


# Size of the spots


@pytest.mark.parametrize("unit", [1e-3, 1, 1e4])
def test_spots_without_an_image_neither_vanish_nor_touch(one, gene, unit):
    del one.uns["spatial"]
    one.obsm["spatial"] = one.obsm["spatial"] * unit
    ax = hv.pl.spatial(one, gene)[0, 0]
    centres, diameters, _ = spots_of(ax)
    np.testing.assert_allclose(centres, one.obsm["spatial"])
    np.testing.assert_allclose(diameters, 1.4 * 55 * unit, rtol=1e-5)  # neighbours are 100 apart
    low, high = sorted(ax.get_ylim())
    assert low < (centres[:, 1] - diameters / 2).min() and (centres[:, 1] + diameters / 2).max() < high
    assert ax.yaxis_inverted()


def test_spot_diameter_of_odd_coordinates():
    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(4.0)), axis=-1).reshape(-1, 2)
    assert spot_diameter(grid) == pytest.approx(0.55)
    assert spot_diameter(np.repeat(grid, 3, axis=0)) == pytest.approx(0.55)
    assert spot_diameter(np.ones((4, 2))) == spot_diameter(np.ones((1, 2))) == 1


def test_one_spot_is_drawn(one, gene):
    single = one[:1].copy()
    assert pixels_of(hv.pl.spatial(single, gene)) is not None
    del single.uns["spatial"]
    _, diameters, values = spots_of(hv.pl.spatial(single, gene)[0, 0])
    assert len(values) == 1 and diameters > 0


# Provenance


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (None, {}),
        ("text", {}),
        ([1], {}),
        ({}, {}),
        ({"a": None, "b": 3, "c": {}}, {"c": {}}),
        ({"a": {"scalefactors": None}, "b": {"scalefactors": "text"}}, {"a": {}, "b": {}}),
        ({2: {"scalefactors": {"x": 1, 3: np.float32(0.5)}}}, {"2": {"x": 1.0, "3": 0.5}}),
        ({"a": {"scalefactors": {"x": np.array(2), "y": np.array([0.5])}}}, {"a": {"x": 2.0, "y": 0.5}}),
        (
            {"a": {"scalefactors": {"n": np.nan, "t": "1", "b": True, "c": 1j, "l": [1], "h": 10**400, "i": -np.inf}}},
            {"a": {}},
        ),
    ],
)
def test_scale_factors_are_the_plain_numbers_there_are(images, expected):
    assert scale_factors(images) == expected


@pytest.mark.usefixtures("brief")
def test_training_does_not_fail_on_odd_images(prepared, model):
    adata = prepared.copy()
    adata.uns["spatial"] = {"S1": {"images": {}, "scalefactors": None}, "S2": adata.uns["spatial"]["S2"], "S3": None}
    trained = hv.tl.train(adata, use_rep="X_histology", library_key="section", config=small_config(), **QUICK)
    assert trained.registry["images"] == {"S1": {}, "S2": model.registry["images"]["S2"]}
    assert trained.registry["images"]["S2"]["spot_diameter_fullres"] == 55
