"""Stores with lost, damaged or pickled chunks are refused in one line that names the slot, before they are used."""

import json
import logging
import os

import anndata as ad
import numcodecs
import numpy as np
import pytest
import zarr
from scipy import sparse

import histovar as hv
from histovar.anndata_io.files import read_files, read_store
from histovar.anndata_io.zarr_store import write_whole

KEY = "X_histology"
ARRAY = {"encoding-type": "array", "encoding-version": "0.2.0"}


@pytest.fixture(params=[2, 3])
def zarr_format(request):
    with ad.settings.override(zarr_write_format=request.param):
        yield request.param


@pytest.fixture
def path(query, tmp_path, zarr_format):
    query.X = sparse.csr_matrix(query.X)
    query.write_zarr(tmp_path / "in.zarr")
    return tmp_path / "in.zarr"


def rewrite(path, slot, values, **options):
    """Replace an array of a store, in other chunks."""
    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    attributes = dict(root[slot].attrs) if hasattr(root[slot], "chunks") else ARRAY
    root.create_array(slot, data=values, overwrite=True, **options).attrs.update(attributes)
    zarr.consolidate_metadata(path)


def chunk_files(path, slot):
    return sorted(file for file in (path / slot).rglob("*") if file.is_file() and not file.name.startswith((".", "z")))


def refuse(path, message):
    for read in (read_store, lambda path: read_files([path])):
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert len(str(caught.value).splitlines()) == 1 and str(path) in str(caught.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_lost_chunks_of_embeddings_are_refused(path, query, zarr_format, sharded):
    if sharded and zarr_format == 2:
        pytest.skip("zarr 2 has no shards")
    rewrite(path, f"obsm/{KEY}", query.obsm[KEY], chunks=(10, 8), shards=(20, 16) if sharded else None)
    np.testing.assert_array_equal(read_files([path]).obsm[KEY], query.obsm[KEY])
    n = 3 if sharded else 12
    assert len(chunk_files(path, f"obsm/{KEY}")) == n
    chunk_files(path, f"obsm/{KEY}")[1].unlink()
    refuse(path, rf"obsm/{KEY} of .*in.zarr' lacks 1 of {n} chunk files, .* as zeros; copy or write the store again")


@pytest.mark.parametrize(
    "slot", ["obsm/spatial", "X/data", "X/indices", "X/indptr", "obs/_index", "var/_index", "obs/section/codes"]
)
def test_lost_slots_are_refused(path, slot):
    labels = ad.io.read_elem(zarr.open_group(path, mode="r")["obs/section"])
    rewrite(path, "obs/section/categories", np.array(["S3", *labels.categories], dtype=str))
    rewrite(path, "obs/section/codes", labels.codes + 1)
    for file in chunk_files(path, slot):
        file.unlink()
    words = slot.split("/")
    refuse(
        path, rf"{words[1]} of .*lacks 1 of 1 chunk" if words[0] != "obs" else rf"{words[1]} of obs of .*lacks 1 of 1"
    )


def test_lost_labels_of_some_spots_are_warned_of(path, caplog):
    rewrite(path, "obs/section/categories", np.array(["S4", "S5"]))
    rewrite(path, "obs/section/codes", np.repeat(np.array([0, 1], np.int8), 30), chunks=(30,))
    assert len(chunk_files(path, "obs/section/codes")) == 1  # zarr leaves zeros out
    with caplog.at_level(logging.WARNING):
        assert (read_files([path]).obs["section"] == "S4").sum() == 30
    assert "section of obs of" in caplog.text and "lacks 1 of 2 chunk files" in caplog.text


def test_dense_expression_may_be_zero(path, query, caplog):
    counts = query.X.toarray()
    counts[:, 3] = 0
    rewrite(path, "X", counts, chunks=(20, 1))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read_files([path]).X, counts)
    assert "X of" in caplog.text and "lacks 3 of 120 chunk files" in caplog.text
    rewrite(path, "X", counts, chunks=(20, 40))
    chunk_files(path, "X")[0].unlink()
    refuse(path, "X of .* lacks 1 of 3 chunk files")
    for file in chunk_files(path, "X"):
        file.unlink()
    assert not read_files([path]).X.any()  # as in objects that have histology alone


def test_zeros_that_are_written_are_taken(path, query, tmp_path):
    query.obsm["absent"] = np.zeros((60, 4))
    query.write_zarr(tmp_path / "left_out.zarr")
    refuse(tmp_path / "left_out.zarr", r"obsm/absent of .*; copy or .*zarr.config.set\(\{'array.write_empty_chunks'")
    write_whole(query, tmp_path / "written.zarr")
    assert not read_files([tmp_path / "written.zarr"]).obsm["absent"].any()


def test_predictions_that_are_zero_are_read(query, model, path, tmp_path):
    hv.tl.predict(query, model)
    query.obsm["histovar"] = np.zeros_like(query.obsm["histovar"])
    query.write_zarr(tmp_path / "predicted.zarr")
    assert not read_files([tmp_path / "predicted.zarr"]).obsm["histovar"].any()


def test_zarr_arrays_in_an_object_are_counted_too(query, loaded, tmp_path):
    array = zarr.create_array(tmp_path / "x.zarr", data=query.obsm[KEY], chunks=(20, 16))
    query.obsm[KEY] = array
    next(file for file in (tmp_path / "x.zarr" / "c").rglob("*") if file.is_file()).unlink()
    with pytest.raises(ValueError, match=rf"use_rep: obsm\['{KEY}'\] lacks 1 of 3 chunk files"):
        hv.tl.predict(query, loaded)


@pytest.mark.parametrize("slot", [f"obsm/{KEY}", "X/data"])
def test_damaged_chunks_are_named(path, slot):
    (file,) = chunk_files(path, slot)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"in.zarr' is (not AnnData in zarr, or is )?damaged"):
        read_files([path])
    with pytest.raises(ValueError, match=rf"{slot.removesuffix('/data')} of .*in.zarr' is damaged; copy or write"):
        adata = read_store(path)
        (adata.X if slot == "X/data" else adata.obsm[KEY]).compute()


def test_pickled_arrays_are_refused_before_they_are_read(path, tmp_path, zarr_format, monkeypatch):
    if zarr_format == 3:
        pytest.skip("zarr 3 has no pickles")
    # What numcodecs did before 0.16.6.
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    mark = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    folder = path / "obs" / "note"
    folder.mkdir()
    names = np.empty(60, object)
    names[:] = [Hostile() for _ in names]
    metadata = {
        **{"zarr_format": 2, "shape": [60], "chunks": [60], "dtype": "|O", "order": "C", "fill_value": None},
        **{"compressor": None, "filters": [{"id": "pickle", "protocol": 4}]},
    }
    (folder / ".zarray").write_text(json.dumps(metadata))
    (folder / ".zattrs").write_text(json.dumps({"encoding-type": "string-array", "encoding-version": "0.2.0"}))
    (folder / "0").write_bytes(numcodecs.Pickle(protocol=4).encode(names))
    attributes = json.loads((path / "obs" / ".zattrs").read_text())
    attributes["column-order"].append("note")
    (path / "obs" / ".zattrs").write_text(json.dumps(attributes))
    (path / ".zmetadata").unlink()
    with pytest.raises(ValueError, match="pickle"):
        read_files([path])
    with pytest.raises(ValueError, match="pickle"):
        read_store(path)
    assert not mark.exists()
