"""Several files read as one object: sections, spots, images and arrays stay with their file."""

import logging

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from histovar.anndata_io.files import distinct_names, read_files, read_store

KEY = "X_uni"


def slide(n=3, genes="ABCD", width=4, sections=None, images=None, seed=0):
    """A small slide, with the same barcodes as every other slide."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(index=[f"AAAC-{i}" for i in range(n)])
    adata = ad.AnnData(rng.poisson(3, (n, len(genes))).astype(np.float32), obs, pd.DataFrame(index=list(genes)))
    adata.obsm[KEY] = rng.normal(size=(n, width)).astype(np.float32)
    adata.obsm["spatial"] = rng.random((n, 2))
    if sections is not None:
        adata.obs["section"] = sections
    if images is not None:
        adata.uns["spatial"] = {name: {"images": {"hires": np.full((2, 2), i)}} for name, i in images.items()}
    return adata


@pytest.fixture
def write(tmp_path):
    def to(name, adata):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (adata.write_zarr if path.suffix == ".zarr" else adata.write_h5ad)(path)
        return path

    return to


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="histovar")
    return caplog


def image_numbers(adata):
    return {name: int(image["images"]["hires"][0, 0]) for name, image in adata.uns["spatial"].items()}


def test_slides_with_the_same_barcodes(write, log):
    paths = [write("a.h5ad", slide(images={"V1": 1})), write("b.h5ad", slide(images={"V1": 2}, seed=1))]
    both = read_files(paths)
    assert both.obs["section"].tolist() == ["a"] * 3 + ["b"] * 3
    assert both.obs_names[[0, 3]].tolist() == ["a_AAAC-0", "b_AAAC-0"] and both.obs_names.is_unique
    assert image_numbers(both) == {"a": 1, "b": 2}
    np.testing.assert_array_equal(both.obsm[KEY][3:], slide(seed=1).obsm[KEY])
    assert "has no obs['section']" in log.text and "get section or file as prefix" in log.text


def test_a_single_file(write, log):
    path = write("liver.h5ad", slide(images={"V1": 1}))
    one = read_files([path])
    assert one.obs["section"].unique().tolist() == ["liver"] and image_numbers(one) == {"liver": 1}
    assert one.obs_names[0] == "AAAC-0"
    with pytest.raises(KeyError, match="no 'slide' in obs of .*liver.h5ad"):
        read_files([path], library_key="slide")
    stored = read_store(write("liver.zarr", slide(images={"V1": 1})))
    assert stored.obs["section"].unique().tolist() == ["liver"] and image_numbers(stored) == {"liver": 1}


def test_names_of_files_are_told_apart(tmp_path):
    def names(*paths):
        return distinct_names([tmp_path / path for path in paths])

    assert names("p1/out.h5ad", "p2/out.h5ad", "c.h5ad") == ["p1_out", "p2_out", "c"]
    assert names("p1/x/out.h5ad", "p2/x/out.h5ad") == ["p1_x_out", "p2_x_out"]
    assert names("s.h5ad", "s.zarr") == ["s.h5ad", "s.zarr"]


def test_sections_of_the_same_name_are_told_apart(write, log):
    first = slide(4, sections=["S1", "S1", "S2", "S2"], images={"S1": 1, "S2": 2})
    second = slide(4, sections=["S1", "S1", "S3", "S3"], images={"S1": 3, "S3": 4}, seed=1)
    both = read_files([write("x.h5ad", first), write("y.zarr", second)])
    assert both.obs["section"].unique().tolist() == ["x_S1", "S2", "y_S1", "S3"]
    assert image_numbers(both) == {"x_S1": 1, "S2": 2, "y_S1": 3, "S3": 4}
    assert both.obs_names[0] == "x_AAAC-0" and "are in several files" in log.text


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_image_never_moves_to_the_section_of_another_file(write, order):
    first = slide(sections="S1", images={"S2": 1, "spare": 2})  # S2 is the name of the other file's section
    second = slide(sections="S2", images={"spare": 3, "other": 4})
    paths = [write("x.h5ad", first), write("y.h5ad", second)]
    images = image_numbers(read_files([paths[i] for i in order]))
    assert "S2" not in images and "S1" not in images
    assert sorted(images.values()) == [1, 2, 3, 4] and images["x_S2"] == 1


def test_images_of_sections_that_were_cut_away_are_left_out(write):
    images = {"S1": 1, "S2": 2}
    paths = [write(f"{s}.h5ad", slide(sections=s, images=images)) for s in images]
    assert image_numbers(read_files(paths)) == images


def test_embeddings_of_different_widths_are_refused(write):
    paths = [write("a.h5ad", slide(width=4)), write("b.h5ad", slide(width=5))]
    with pytest.raises(ValueError, match=r"obsm\['X_uni'\] differs in width: 4 in .*a.h5ad'?, 5 in .*b.h5ad"):
        read_files(paths)


def test_arrays_that_are_not_shared_are_left_out(write, log):
    first, second = slide(), slide(genes="BCDE")
    first.obsm["X_pca"], second.obsm["X_pca"] = np.ones((3, 2)), np.ones((3, 3))
    first.obsm["X_gigapath"] = np.ones((3, 2))
    second.layers["raw"] = second.X
    first.obs["age"], second.obs["age"] = 5, pd.Categorical(["old"] * 3)
    first.obs["batch"] = "one"
    first.X = sparse.csr_matrix(first.X)
    both = read_files([write("a.h5ad", first), write("b.h5ad", second)])
    assert list(both.obsm) == [KEY, "spatial"] and not both.layers
    assert both.var_names.tolist() == list("BCD") and "3 genes are shared" in log.text
    assert both.obs["age"].astype(str).tolist() == ["5"] * 3 + ["old"] * 3
    np.testing.assert_array_equal(both.X.toarray()[3:], second[:, list("BCD")].X)
    for words in (
        "obsm['X_pca'] is left out",
        "obsm['X_gigapath'] is left out, since these files lack it: ",
        "layers['raw'] is left out",
        "batch",
    ):
        assert words in log.text


def test_files_without_genes(write):
    histology = ad.AnnData(obs=pd.DataFrame(index=["s"]), obsm={KEY: np.ones((1, 4)), "spatial": np.ones((1, 2))})
    both = read_files([write("a.h5ad", slide()), write("b.h5ad", histology)])
    assert both.shape == (4, 0) and KEY in both.obsm
    with pytest.raises(ValueError, match="share no genes"):
        read_files([write("a.h5ad", slide()), write("c.h5ad", slide(genes="abcd"))])
    doubled = slide()
    doubled.var_names = list("AABC")
    with pytest.raises(ValueError, match=r"d.h5ad' has duplicated names of genes such as \['A'\]"):
        read_files([write("a.h5ad", slide()), write("d.h5ad", doubled)])


def test_a_panel_that_files_do_not_share_is_left_out(write, log):
    first, second = slide(), slide(genes="BCDE")
    for adata in (first, second):
        adata.var["histovar_panel"] = True
        adata.varm["histovar_scales"] = np.zeros((4, 1), int)
    both = read_files([write("a.h5ad", first), write("b.h5ad", second)])
    assert "histovar_panel" not in both.var and "histovar_scales" not in both.varm
    assert "gene panel differs between the files" in log.text
    same = read_files([write("a.h5ad", first), write("c.h5ad", first)])
    assert same.var["histovar_panel"].all()


def test_files_that_cannot_be_read_are_named(write, tmp_path):
    whole = write("a.h5ad", slide())
    content = whole.read_bytes()
    (tmp_path / "half.h5ad").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.h5ad").write_text("barcode,gene")
    with h5py.File(tmp_path / "tenx.h5", "w") as file:
        file["matrix/data"] = [1]
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "sd.zarr" / "tables" / "table").mkdir(parents=True)
    for name, words in (
        ("half.h5ad", "is truncated"),
        ("text.h5ad", "is not AnnData in .h5ad"),
        ("tenx.h5", "is not AnnData in .h5ad"),
        ("empty.zarr", "is not AnnData in zarr"),
        ("sd.zarr", r"is SpatialData; give its table, .*tables.table"),
    ):
        with pytest.raises(ValueError, match=rf"{name}' {words}") as caught:
            read_files([whole, tmp_path / name])
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"empty.zarr' is not AnnData in zarr"):
        read_store(tmp_path / "empty.zarr")
    with pytest.raises(FileNotFoundError, match="no file '.*absent.h5ad'"):
        read_files([whole, tmp_path / "absent.h5ad"])
    with pytest.raises(ValueError, match="a.h5ad' is given twice"):
        read_files([whole, tmp_path / "." / "a.h5ad"])
