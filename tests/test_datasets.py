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
    with pytest.raises(ValueError, match="n_genes must be at least 2"):
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
    with pytest.raises(ValueError, match="3 rows and no barcodes, slide 'MEND1' has 4 spots"):
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
    with pytest.raises(Exception, match="[Ww]eights"):
        hv.datasets.hest(slides, "PRAD", slides=["MEND1"])
    assert not (slides / "touched").exists()
