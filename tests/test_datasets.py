import gzip

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import histovar as hv


def test_simulation_repeats_and_is_learnable():
    one, other, third = (hv.datasets.simulate(2, 80, 30, embedding_dim=8, random_state=s) for s in (0, 0, 1))
    assert (one.X != other.X).nnz == 0 and (one.X != third.X).nnz > 0
    np.testing.assert_array_equal(one.obsm["X_histology"], other.obsm["X_histology"])
    assert one.obs["section"].value_counts().tolist() == [80, 80]
    assert one.obs["region"].nunique() > 2
    assert set(one.uns["spatial"]) == {"S1", "S2"}
    assert one.uns["spatial"]["S1"]["images"]["hires"].dtype == np.uint8
    with pytest.raises(ValueError, match="n_genes: expected at least 2, got 1"):
        hv.datasets.simulate(n_genes=1)


@pytest.fixture
def her2st_root(tmp_path):
    """Two sections in the published layout; one spot lacks counts, one count row lacks a spot."""
    data = tmp_path / "data"
    for folder in ("ST-cnts", "ST-spotfiles", "ST-imgs/B/B1"):
        (data / folder).mkdir(parents=True)
    for name, genes in (("B1", "ABC"), ("B2", "BCD")):
        counts = pd.DataFrame(np.arange(9).reshape(3, 3), index=["10x11", "11x11", "12x12"], columns=list(genes))
        with gzip.open(data / "ST-cnts" / f"{name}.tsv.gz", "wt") as file:
            counts.to_csv(file, sep="\t")
        spots = pd.DataFrame(
            {
                "x": [11.2, 9.9, 30.0],
                "y": [11.0, 10.8, 30.0],
                "pixel_x": [200.0, 100.0, 9.0],
                "pixel_y": [50.0, 60.0, 9.0],
            }
        )
        spots.to_csv(data / "ST-spotfiles" / f"{name}_selection.tsv", sep="\t", index=False)
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(data / "ST-imgs" / "B" / "B1" / "x.jpg")
    return tmp_path


def test_her2st_matches_counts_and_spots_by_name(her2st_root):
    adata = hv.datasets.her2st(her2st_root, image_width=20)
    assert list(adata.obs_names) == ["B1_10x11", "B1_11x11", "B2_10x11", "B2_11x11"]
    frame = adata.to_df()
    assert frame.loc["B1_11x11"].to_dict() == {"A": 3, "B": 4, "C": 5, "D": 0}
    assert frame.loc["B2_10x11"].to_dict() == {"A": 0, "B": 0, "C": 1, "D": 2}
    np.testing.assert_array_equal(adata["B1_10x11"].obsm["spatial"], [[100, 60]])
    image = adata.uns["spatial"]["B1"]
    assert image["images"]["hires"].shape == (10, 20, 3)
    assert image["scalefactors"]["tissue_hires_scalef"] == 0.25
    assert image["scalefactors"]["spot_diameter_fullres"] == pytest.approx(50)
    assert set(hv.datasets.her2st(her2st_root, sections=["B2"]).obs["section"]) == {"B2"}
    with pytest.raises(FileNotFoundError, match=r"sections: \['Z9'\] not found"):
        hv.datasets.her2st(her2st_root, sections=["Z9"])
    with pytest.raises(FileNotFoundError, match="no ST-cnts"):
        hv.datasets.her2st(her2st_root / "data" / "ST-imgs")


def test_her2st_refuses_images_that_would_fill_the_memory(her2st_root):
    image = her2st_root / "data" / "ST-imgs" / "B" / "B1" / "x.jpg"
    content = image.read_bytes()
    size = content.index(b"\xff\xc0") + 5
    image.write_bytes(content[:size] + b"\xff\xff\xff\xff" + content[size + 4 :])
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="x.jpg' cannot be read .*its 65535 x 65535 pixels are more than 400,000,000"):
        hv.datasets.her2st(her2st_root)
    assert Image.MAX_IMAGE_PIXELS == limit
    assert not hv.datasets.her2st(her2st_root, image_width=0).uns


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("ST-imgs/B/B1/x.jpg", lambda content: content[:300], "x.jpg' cannot be read"),
        ("ST-imgs/B/B1/x.jpg", lambda content: b"GIF89a" + content, "x.jpg' cannot be read"),
        ("ST-cnts/B1.tsv.gz", lambda content: content[:50], "B1.tsv.gz' is damaged or not a tab-separated table"),
        ("ST-cnts/B1.tsv.gz", lambda content: gzip.compress(b"\tA\n10x11\tmany\n11x11\t3\n"), "are not all numbers"),
        (
            "ST-spotfiles/B1_selection.tsv",
            lambda content: b"x\ty\n1\t2\n",
            r"lacks numbers in columns \['pixel_x', 'pi",
        ),
        ("ST-spotfiles/B1_selection.tsv", lambda content: content.splitlines()[0], "no count row of section B1"),
        (
            "ST-spotfiles/B1_selection.tsv",
            lambda content: content.replace(b"200.0", b"1e99"),
            r"numbers .*\['pixel_x'\]",
        ),
        (
            "ST-spotfiles/B1_selection.tsv",
            lambda content: b"\xff\xfe\0",
            "B1_selection.tsv' is damaged or not a tab-separated table",
        ),
    ],
)
def test_her2st_names_damaged_files(her2st_root, name, damage, message):
    file = her2st_root / "data" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        hv.datasets.her2st(her2st_root)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def slides(tmp_path):
    """Two slides in HEST's layout, without embeddings."""
    (tmp_path / "PRAD" / "st").mkdir(parents=True)
    made = {}
    for i, name in enumerate(("MEND1", "MEND10")):
        adata = ad.AnnData(np.arange(12.0).reshape(4, 3) + i, obs=pd.DataFrame(index=[f"s{j}" for j in range(4)]))
        adata.var_names = list("ABC") if i == 0 else list("BCD")
        adata.obsm["spatial"] = np.arange(8.0).reshape(4, 2)
        image = {"images": {"downscaled_fullres": np.zeros((5, 5, 3), np.uint8)}}
        image["scalefactors"] = {"tissue_downscaled_fullres_scalef": 0.1, "spot_diameter_fullres": 3.0}
        adata.uns["spatial"] = {"ST": image}
        adata.write_h5ad(tmp_path / "PRAD" / "st" / f"{name}.h5ad")
        made[name] = adata
    return tmp_path


def embeddings(n, seed):
    return np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float32)


def test_hest_reads_tensors_in_order(slides):
    folder = slides / "PRAD" / "processed" / "uni_embeddings"
    folder.mkdir(parents=True)
    for i, name in enumerate(("MEND1", "MEND10")):
        torch.save(torch.from_numpy(embeddings(4, i)), folder / f"{name}_uni.pt")
    adata = hv.datasets.hest(slides, "PRAD")
    assert list(adata.var_names) == ["B", "C"] and adata.obs["section"].tolist() == ["MEND1"] * 4 + ["MEND10"] * 4
    np.testing.assert_array_equal(adata.obsm["X_uni"], np.concatenate([embeddings(4, 0), embeddings(4, 1)]))
    assert adata.uns["spatial"]["MEND10"]["scalefactors"]["tissue_hires_scalef"] == 0.1
    with pytest.raises(FileNotFoundError, match="no file of 'conch' embeddings"):
        torch.save(torch.zeros(4, 2), folder / "MEND1_uni_v2.pt")
        hv.datasets.hest(slides, "PRAD", embedding="conch")
    with pytest.raises(ValueError, match="several files fit"):
        hv.datasets.hest(slides, "PRAD")


def write_h5(path, barcodes, values):
    with h5py.File(path, "w") as file:
        file["embeddings"] = values
        file["barcodes"] = np.array(barcodes, dtype="S")[:, None]
        file["coords"] = np.zeros((len(values), 2))


def test_hest_matches_by_barcode(slides):
    for i, name in enumerate(("MEND1", "MEND10")):
        write_h5(slides / "PRAD" / f"{name}.h5", ["s3", "s0", "s1"], embeddings(3, i))
    adata = hv.datasets.hest(slides, "PRAD", slides=["MEND10"])
    assert list(adata.obs_names) == ["MEND10_s0", "MEND10_s1", "MEND10_s3"]
    np.testing.assert_array_equal(adata.obsm["X_uni"], embeddings(3, 1)[[1, 2, 0]])
    torch.save({"embeddings": torch.zeros(2, 6), "barcodes": ["s2", "s1"]}, slides / "PRAD" / "MEND1_uni.pt")
    assert hv.datasets.hest(slides, "PRAD", slides=["MEND1"]).n_obs == 2


def test_hest_refuses_what_cannot_be_matched(slides):
    path = slides / "PRAD" / "MEND1.pt"
    torch.save(torch.zeros(3, 6), path)
    with pytest.raises(ValueError, match="3 rows and no barcodes, but slide 'MEND1' has 4 spots"):
        hv.datasets.hest(slides, "PRAD", slides=["MEND1"])
    path.unlink()
    write_h5(slides / "PRAD" / "MEND1.h5", ["x", "y"], embeddings(2, 0))
    with pytest.raises(ValueError, match="no barcode of MEND1.h5"):
        hv.datasets.hest(slides, "PRAD", slides=["MEND1"])
    with pytest.raises(FileNotFoundError, match="dataset: no directory"):
        hv.datasets.hest(slides, "LUAD")
    with pytest.raises(FileNotFoundError, match=r"slides: \['X'\] not in"):
        hv.datasets.hest(slides, "PRAD", slides=["X"])


def test_hest_never_unpickles(slides):
    class Payload:
        def __reduce__(self):
            return (open, (str(slides / "touched"), "w"))

    torch.save({"embeddings": Payload()}, slides / "PRAD" / "MEND1.pt")
    with pytest.raises(ValueError, match="MEND1.pt cannot be read by torch.load.weights_only=True"):
        hv.datasets.hest(slides, "PRAD", slides=["MEND1"])
    assert not (slides / "touched").exists()


N_SPOTS = 40
CENTRES = np.column_stack([100.0 * (np.arange(N_SPOTS) % 8), 100.0 * (np.arange(N_SPOTS) // 8)]) + 1000
CORNERS = (CENTRES - 112).astype(int)
SHUFFLED = np.random.default_rng(0).permutation(N_SPOTS)
SPOTS = [f"AACG{i}-1" for i in range(N_SPOTS)]


def write_slide(path, spots=SPOTS, genes="ABC", spatial=CENTRES, uns=None):
    adata = ad.AnnData(np.ones((len(spots), len(genes))), pd.DataFrame(index=spots), pd.DataFrame(index=list(genes)))
    if spatial is not None:
        adata.obsm["spatial"] = spatial
    adata.uns = uns or {}
    path.parent.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(path)


@pytest.fixture
def grid(tmp_path):
    """Directory with slide A of 40 spots on a grid, 100 pixels apart."""
    write_slide(tmp_path / "st" / "A.h5ad")
    return tmp_path


def write(path, **arrays):
    """Write arrays to a .h5 file, or to the dictionary of a .pt file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    else:
        tensors = {k: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for k, a in arrays.items()}
        torch.save(tensors, path)


def shuffled_names(names=SPOTS):
    return [names[i] for i in SHUFFLED]


@pytest.mark.parametrize("kind", ["h5", "pt"])
@pytest.mark.parametrize("name", ["barcode", "barcodes", "ids", "spot_ids", "names", "cell_ids", "obs_names", "tiles"])
def test_hest_matches_spots_in_another_order_by_any_array_of_their_names(grid, kind, name):
    values = embeddings(N_SPOTS, 0)
    write(grid / f"A.{kind}", embeddings=values[SHUFFLED], coords=CORNERS[SHUFFLED], **{name: shuffled_names()})
    np.testing.assert_array_equal(hv.datasets.hest(grid).obsm["X_uni"], values)


@pytest.mark.parametrize("kind", ["h5", "pt"])
def test_hest_matches_integer_ids(tmp_path, kind):
    write_slide(tmp_path / "st" / "A.h5ad", spots=[str(i) for i in range(N_SPOTS)])
    values = embeddings(N_SPOTS, 0)
    write(tmp_path / f"A.{kind}", embeddings=values[SHUFFLED], spot_id=SHUFFLED)
    np.testing.assert_array_equal(hv.datasets.hest(tmp_path).obsm["X_uni"], values)


def test_hest_matches_ids_in_a_column_of_bytes(grid):
    values = embeddings(N_SPOTS, 0)
    write(grid / "A.h5", embeddings=values[SHUFFLED], tile=np.array(shuffled_names(), dtype="S")[:, None])
    np.testing.assert_array_equal(hv.datasets.hest(grid).obsm["X_uni"], values)


def test_hest_prefers_spot_names_to_other_strings(grid):
    values = embeddings(N_SPOTS, 0)
    patches = [f"patch {i}" for i in range(N_SPOTS)]
    write(grid / "A.h5", embeddings=values[SHUFFLED], ids=patches, region=["tumour"] * N_SPOTS, spot=shuffled_names())
    np.testing.assert_array_equal(hv.datasets.hest(grid).obsm["X_uni"], values)


def test_hest_does_not_take_labels_for_ids(grid):
    values = embeddings(N_SPOTS, 0)
    write(grid / "A.h5", embeddings=values, coords=CORNERS, region=["tumour", "stroma"] * (N_SPOTS // 2))
    np.testing.assert_array_equal(hv.datasets.hest(grid).obsm["X_uni"], values)


@pytest.mark.parametrize("kind", ["h5", "pt"])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tile": [f"tile {i}" for i in range(N_SPOTS)]}, "no barcode of A.*'tile': 'tile 0', 'tile 1'.*slide 'A'"),
        ({"ids": np.arange(N_SPOTS)}, "no barcode of A.*'ids': '0', '1'"),
        ({"barcodes": SPOTS[:30]}, "barcodes .*(30,).* for 40 embeddings"),
        ({"barcodes": np.linspace(0, 1, N_SPOTS)}, "barcodes float64 .*must be strings or integers"),
        (
            {"barcodes": [*SPOTS[1:], SPOTS[1]]},
            "'barcodes' of A.* has 40 rows for 39 different.*duplicates are 'AACG1-1'",
        ),
        ({"tile": [*SPOTS[1:], SPOTS[1]]}, "'tile' of A.* has 40 rows for 39 different"),
        ({"ids": SPOTS, "names": SPOTS[::-1]}, "'ids' and 'names' of A.* in different orders"),
        ({"coords": CORNERS[:30]}, "'coords' of A.* has 30 rows for 40 embeddings"),
    ],
)
def test_hest_refuses_ids_that_are_not_of_the_spots(grid, kind, arrays, message):
    write(grid / f"A.{kind}", embeddings=embeddings(N_SPOTS, 0), **arrays)
    with pytest.raises(ValueError, match=message):
        hv.datasets.hest(grid)


@pytest.mark.parametrize("kind", ["h5", "pt"])
def test_hest_compares_coords_with_the_spots_matched_by_id(grid, kind):
    values, file = embeddings(N_SPOTS, 0), grid / f"A.{kind}"
    for coords in (CENTRES, CORNERS, (CENTRES * 0.25).astype(int), CENTRES * [2, 0.5] + 7, np.zeros((N_SPOTS, 2))):
        write(file, embeddings=values[SHUFFLED], barcodes=shuffled_names(), coords=coords[SHUFFLED])
        np.testing.assert_array_equal(hv.datasets.hest(grid).obsm["X_uni"], values)
    swapped = CORNERS.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    for coords in (swapped, CORNERS[::-1].copy(), CORNERS[:, ::-1].copy()):
        write(file, embeddings=values, barcodes=SPOTS, coords=coords)
        with pytest.raises(ValueError, match="coords of A.* disagree with .* slide 'A': matched by 'barcodes', spot"):
            hv.datasets.hest(grid)


def test_hest_compares_coords_of_some_spots(grid):
    values, some = embeddings(N_SPOTS, 0), SHUFFLED[:15]
    write(grid / "A.h5", embeddings=values[some], barcodes=[SPOTS[i] for i in some], coords=CORNERS[some])
    np.testing.assert_array_equal(hv.datasets.hest(grid).obsm["X_uni"], values[np.sort(some)])


@pytest.mark.parametrize("kind", ["h5", "pt"])
def test_hest_without_ids_needs_coords_in_the_order_of_the_slide(grid, kind, caplog):
    values, file = embeddings(N_SPOTS, 0), grid / f"A.{kind}"
    write(file, embeddings=values, coords=CORNERS)
    np.testing.assert_array_equal(hv.datasets.hest(grid).obsm["X_uni"], values)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    for order in (SHUFFLED, np.arange(N_SPOTS)[::-1], np.roll(np.arange(N_SPOTS), 1)):
        write(file, embeddings=values[order], coords=CORNERS[order])
        with pytest.raises(ValueError, match="coords are not in the order of .* slide 'A'.*store barcodes"):
            hv.datasets.hest(grid)
    write(file, embeddings=values[:30], coords=CORNERS[:30])
    with pytest.raises(ValueError, match="30 rows and no barcodes, but slide 'A' has 40 spots"):
        hv.datasets.hest(grid)


@pytest.mark.parametrize("kind", ["h5", "pt"])
@pytest.mark.parametrize("arrays", [{}, {"coords": np.zeros((N_SPOTS, 2))}, {"coords": np.full((N_SPOTS, 2), np.nan)}])
def test_hest_warns_of_embeddings_without_ids_and_coords(grid, kind, arrays, caplog):
    values = embeddings(N_SPOTS, 0)
    write(grid / f"A.{kind}", embeddings=values, **arrays)
    np.testing.assert_array_equal(hv.datasets.hest(grid).obsm["X_uni"], values)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and f"A.{kind} has neither barcodes nor distinct coords" in warnings[0]


@pytest.mark.parametrize("kind", ["h5", "pt"])
@pytest.mark.parametrize("name", ["embeddings", "embedding", "features", "feats"])
def test_hest_reads_embeddings_under_common_names(grid, kind, name):
    values = embeddings(N_SPOTS, 0)
    write(grid / f"A.{kind}", **{name: values[None]}, barcodes=SPOTS)
    np.testing.assert_array_equal(hv.datasets.hest(grid).obsm["X_uni"], values)


@pytest.mark.parametrize("kind", ["h5", "pt"])
@pytest.mark.parametrize(
    "arrays",
    [
        {"vectors": np.zeros((N_SPOTS, 6))},
        {"features": np.zeros(N_SPOTS)},
        {"features": np.zeros((2, N_SPOTS, 6))},
        {"features": np.zeros((N_SPOTS, 6), bool)},
        {"features": np.zeros((0, 6))},
    ],
)
def test_hest_lists_what_a_file_without_embeddings_has(grid, kind, arrays):
    write(grid / f"A.{kind}", **arrays, coords=CORNERS)
    name, array = next(iter(arrays.items()))
    with pytest.raises(ValueError, match=f"A.{kind} has no numbers .n_spots, width. named 'embeddings'") as error:
        hv.datasets.hest(grid)
    assert f"{name} {array.dtype} {array.shape}" in str(error.value) and "coords int64 (40, 2)" in str(error.value)


@pytest.mark.parametrize("content", [[torch.zeros(N_SPOTS, 6)], "text", {"model": "uni"}, torch.zeros(N_SPOTS)])
def test_hest_refuses_pt_files_of_something_else(grid, content):
    torch.save(content, grid / "A.pt")
    with pytest.raises(ValueError, match="embedding: A.pt h"):
        hv.datasets.hest(grid)


def test_hest_names_damaged_files(grid):
    for kind in ("h5", "pt"):
        file = grid / f"A.{kind}"
        write(file, embeddings=embeddings(N_SPOTS, 0), barcodes=SPOTS)
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"not an array", b""):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"A.{kind} cannot be read"):
                hv.datasets.hest(grid)
        file.unlink()


def test_hest_names_damaged_slides(slides, tmp_path):
    file = tmp_path / "PRAD" / "st" / "MEND1.h5ad"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"MEND1.h5ad' is truncated; copy or write it again") as caught:
        hv.datasets.hest(tmp_path, "PRAD", embedding=None)
    assert len(str(caught.value).splitlines()) == 1


def test_hest_refuses_slides_with_embeddings_of_different_widths(grid):
    write_slide(grid / "st" / "B.h5ad")
    for slide, width in (("A", 32), ("B", 48)):
        torch.save(torch.zeros(N_SPOTS, width), grid / f"{slide}.pt")
    with pytest.raises(ValueError, match=r"different widths: A.pt \(32\), B.pt \(48\)"):
        hv.datasets.hest(grid)


def save_marked(root, **marks):
    """Embeddings filled with a number for each path."""
    for name, mark in marks.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.full((N_SPOTS, 2), float(mark)), file)


@pytest.mark.parametrize(
    ("embedding", "files", "expected"),
    [
        ("conch_v1", {"features_conch_v15/A.pt": 1, "features_conch_v1/A.pt": 2}, 2),
        ("conch_v1", {"conch_v1.5/A.pt": 1, "conch_v1/A.pt": 2}, 2),
        ("UNI", {"uni2/A.pt": 1, "unicorn/A.pt": 2, "20x/features_uni_v1/A.pt": 3}, 3),
        ("virchow", {"A_virchow2.pt": 1, "A_virchow.pt": 2}, 2),
        ("uni", {"A_anything.pt": 1}, 1),
        ("conch_v1", {"features_conch_v15/A.pt": 1}, None),
        ("conch_v1", {"features_conch_v15/A.pt": 1, "features_uni/A.pt": 2}, None),
        ("conch_v15", {"features_conch_v1/A.pt": 1}, None),
        ("uni", {"A_uni2.pt": 1}, None),
        ("uni", {"conch/A.pt": 1}, None),
    ],
)
def test_hest_finds_encoders_by_whole_words(grid, embedding, files, expected):
    save_marked(grid, **files)
    if expected is None:
        with pytest.raises(FileNotFoundError, match=f"no file of '{embedding}' embeddings of slide 'A'"):
            hv.datasets.hest(grid, embedding=embedding)
    else:
        assert (hv.datasets.hest(grid, embedding=embedding).obsm[f"X_{embedding}"] == expected).all()


def test_hest_tells_slides_from_encoders(tmp_path):
    for slide in ("A", "A_1", "uni", "uni_2"):
        write_slide(tmp_path / "st" / f"{slide}.h5ad")
    files = {"A_uni.pt": 1, "A_1_uni.pt": 2, "uni/uni.pt": 3, "conch/uni.pt": 4, "uni_2_conch.pt": 5, "uni_2_uni.pt": 6}
    save_marked(tmp_path, **files)
    adata = hv.datasets.hest(tmp_path)
    marks = dict(zip(adata.obs["section"], adata.obsm["X_uni"][:, 0], strict=True))
    assert marks == {"A": 1, "A_1": 2, "uni": 3, "uni_2": 6}
    (tmp_path / "A_uni.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"slide 'A' below .*files of this slide: \[\]"):
        hv.datasets.hest(tmp_path, slides="A")


def test_hest_reads_slides_with_brackets_in_their_names(tmp_path):
    write_slide(tmp_path / "st" / "A[1].h5ad")
    save_marked(tmp_path, **{"A[1].pt": 1})
    assert hv.datasets.hest(tmp_path).n_obs == N_SPOTS


def test_hest_reads_one_slide_by_its_name(slides):
    adata = hv.datasets.hest(slides, "PRAD", embedding=None, slides="MEND1")
    assert set(adata.obs["section"]) == {"MEND1"} and list(adata.obs_names[:2]) == ["MEND1_s0", "MEND1_s1"]
    with pytest.raises(ValueError, match=r"slides: expected at least one key, got \[\]"):
        hv.datasets.hest(slides, "PRAD", embedding=None, slides=[])
    with pytest.raises(ValueError, match=r"slides: expected keys .* each once, got \['MEND1', 'MEND1'\]"):
        hv.datasets.hest(slides, "PRAD", embedding=None, slides=["MEND1", "MEND1"])


@pytest.mark.parametrize(
    ("spots", "spatial", "message"),
    [
        (SPOTS, None, r"slide 'B' has no obsm\['spatial'\]"),
        (SPOTS, np.zeros((N_SPOTS, 3)), r"obsm\['spatial'\] of slide 'B' is float64 \(40, 3\)"),
        ([*SPOTS[1:], SPOTS[1]], CENTRES, r"slide 'B' has several spots named \['AACG1-1'\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_hest_refuses_slides_without_positions_or_with_duplicate_spots(grid, spots, spatial, message):
    write_slide(grid / "st" / "B.h5ad", spots=spots, spatial=spatial)
    with pytest.raises(ValueError, match=message):
        hv.datasets.hest(grid, embedding=None)


def test_hest_refuses_slides_that_share_no_gene(grid):
    write_slide(grid / "st" / "B.h5ad", genes="CDE")
    assert list(hv.datasets.hest(grid, embedding=None).var_names) == ["C"]
    write_slide(grid / "st" / "C.h5ad", genes="DEF")
    with pytest.raises(
        ValueError, match=r"slides: 'C' \(genes \['D', 'E', 'F'\].* none of the genes shared by \['A', 'B'\]"
    ):
        hv.datasets.hest(grid, embedding=None)


IMAGE = np.zeros((5, 5, 3), np.uint8)


@pytest.mark.parametrize(
    "uns",
    [
        {},
        {"spatial": {}},
        {"spatial": {"ST": {}}},
        {"spatial": {"ST": {"images": {"hires": IMAGE}}}},
        {"spatial": {"ST": {"images": {"hires": IMAGE}, "scalefactors": None}}},
        {"spatial": {"ST": {"images": {"hires": IMAGE}, "scalefactors": {"spot_diameter_fullres": 3.0}}}},
        {"spatial": {"ST": {"images": None, "scalefactors": {"tissue_hires_scalef": 0.1}}}},
    ],
)
def test_hest_leaves_out_images_without_scale_factor(tmp_path, uns, caplog):
    write_slide(tmp_path / "st" / "A.h5ad", uns=uns)
    with caplog.at_level("INFO"):
        adata = hv.datasets.hest(tmp_path, embedding=None)
    assert adata.uns["spatial"] == {} and "slide A has no image with a scale factor" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": 3}, TypeError, "path: expected a path, got 3"),
        ({"path": ".", "sections": "C2"}, TypeError, "sections: expected a list"),
        ({"path": ".", "image_width": -1}, ValueError, "image_width: expected at least 0, got -1"),
    ],
)
def test_wrong_arguments_of_her2st_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        hv.datasets.her2st(**options)
