"""Accuracy at tiles of a slide compared with measured spots, and time and memory of each step from slide to map.

    python benchmarks/journey.py --out DIR   # train on C2, C4 and C5 of her2st, predict the slide of C3
    python benchmarks/journey.py --smoke     # to see that it runs: simulated sections, a small image, a toy encoder

The environment variable HISTOVAR_DATA names the directory with the data. C3 has 180 measured spots, 200 um apart; a
spacing of 93 um gives a thousand tiles. ``--out`` keeps the model and the embedded spots for the next run, whose times
and memory are then those of a process that has not trained.

Predictions for tiles are interpolated linearly at the spots, between the three tiles around each (Delaunay
triangulation); a spot outside of the triangles takes the nearest tile's. They are scored against measured expression,
as are predictions from the H&E around the spots themselves.

Steps are the calls behind ``histovar tile | embed | predict | report | export``, with libraries and model already
loaded. Seconds are wall-clock and processor time, which differ if other work runs on the machine. Memory is the
process's peak during the step, on Linux only; the first row is what libraries and model take.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import tifffile
import torch
from compare import NAMED
from numpy.typing import NDArray
from PIL import Image
from real_data import data_path
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from smoke import quick_options
from torch import nn

import histovar as hv

HELD_OUT, MPP = "C3", 0.73
# The spots' own spacing, and that of a thousand tiles.
SPACINGS_UM = (200.0, 93.0)
TARGET = 0.02
FIELDS_UM = (112, 224)


@dataclass
class Case:
    """Sections with measured spots and H&E, one of which is held out and has a slide."""

    adata: ad.AnnData
    images: dict[str, Path]
    held_out: str
    slide: Path
    mpp: float
    encoder: hv.encoders.Encoder
    weights: Path | None
    spacings_um: tuple[float, ...]
    panel: dict[str, Any]
    training: dict[str, Any]

    @property
    def reps(self) -> list[str]:
        """Slots of the embeddings."""
        return [f"X_{self.encoder.name}_{um}um" for um in FIELDS_UM]

    def embed(self, adata: ad.AnnData, **options: Any) -> None:
        """Embed the H&E around spots or tiles."""
        hv.pp.embed(
            adata,
            self.encoder,
            field_um=FIELDS_UM,
            weights=self.weights,
            device="cpu",
            show_progress_bar=False,
            **options,
        )


def her2st() -> Case:
    """Patient C of her2st, by DINOv2."""
    named = NAMED["her2st"]
    adata = ad.read_h5ad(data_path(named.file))
    folder = data_path("her2st/raw/data/ST-imgs/C")
    images = {section: next((folder / section).glob("*.jpg")) for section in adata.obs["section"].unique()}
    weights = data_path("encoders/dinov2_vits14.safetensors")
    panel = {"n_genes": 200, "min_fraction": named.min_fraction}
    slide = data_path("slides/her2st_C3.tif")
    return Case(adata, images, HELD_OUT, slide, MPP, hv.encoders.get("dinov2_vits14"), weights, SPACINGS_UM, panel, {})


class Colours(nn.Module):
    """A toy encoder: mean and standard deviation of each colour in quarters of the patch."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, height, width) to features (n, 24)."""
        parts = images.unflatten(3, (2, -1)).unflatten(2, (2, -1))
        return torch.cat([parts.mean((3, 5)).flatten(1), parts.std((3, 5)).flatten(1)], 1)


def simulated(folder: Path) -> Case:
    """Three small sections with images of 1 um a pixel."""
    adata = hv.datasets.simulate(3, 60, 30)
    images = {}
    for section, entry in adata.uns["spatial"].items():
        pixels = Image.fromarray(entry["images"]["hires"])
        side = round(pixels.width / entry["scalefactors"]["tissue_hires_scalef"])
        images[section] = folder / f"{section}.tif"
        tifffile.imwrite(
            images[section], np.asarray(pixels.resize((side, side))), tile=(256, 256), photometric="rgb",
            resolution=(1e4, 1e4), resolutionunit="CENTIMETER",
        )  # fmt: skip
    encoder = hv.encoders.Encoder(name="colours", module=Colours())
    panel = {"n_genes": 30, "min_fraction": 0.0}
    return Case(adata, images, "S3", images["S3"], 1.0, encoder, None, (100.0,), panel, quick_options(30))


def prepare(case: Case, folder: Path) -> tuple[hv.TwoStageVARST, ad.AnnData]:
    """Train on the other sections, predict and score the held-out spots; keep model and spots in the folder."""
    spots_file, model_folder = folder / "spots.h5ad", folder / "model"
    if not spots_file.is_file():
        adata = case.adata
        case.embed(adata, image=case.images, mpp=case.mpp, library_key="section")
        held_out = (adata.obs["section"] == case.held_out).to_numpy()
        training, spots = adata[~held_out].copy(), adata[held_out].copy()
        hv.pp.gene_panel(training, library_key="section", **case.panel)
        options = {"enable_progress_bar": False, **case.training}
        model = hv.tl.train(training, use_rep=case.reps, library_key="section", **options)
        hv.tl.predict(spots, model, show_progress_bar=False)
        hv.tl.evaluate(spots)
        model.save(model_folder)
        spots.write_h5ad(spots_file)
    return hv.TwoStageVARST.load(model_folder), ad.read_h5ad(spots_file)


def peak_gb() -> float:
    """Peak memory of the process since :func:`reset_peak`, in GB; NaN if the system does not tell."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    return float("nan")


def reset_peak() -> None:
    """Reset the process's peak memory to what is in use now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Steps:
    """Seconds and peak memory of one step after another."""

    def __init__(self) -> None:
        reset_peak()
        self.rows: list[dict[str, Any]] = [{"step": "before", "GB": peak_gb()}]

    def run(self, step: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function, and record its time and memory."""
        reset_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*arguments, **options)
        took = {"seconds": time.perf_counter() - wall, "processor, s": time.process_time() - cpu, "GB": peak_gb()}
        self.rows.append({"step": step, **took})
        print(self.rows[-1], flush=True)
        return result

    def table(self) -> pd.DataFrame:
        """A row a step."""
        return pd.DataFrame(self.rows)[["step", "seconds", "processor, s", "GB"]].set_index("step")


def journey(case: Case, model: hv.TwoStageVARST, spacing_um: float, folder: Path) -> tuple[ad.AnnData, pd.DataFrame]:
    """Tile, embed, predict and export a slide; return the predicted tiles, and time and memory of each step."""
    steps = Steps()
    tiles = steps.run("tile", hv.pp.tile, case.slide, spacing_um=spacing_um, mpp=case.mpp, section=case.held_out)
    steps.run("embed", case.embed, tiles)
    steps.run("predict", hv.tl.predict, tiles, model, quantiles=(0.05, 0.95), show_progress_bar=False)
    written = {"report": folder / "report.html", "GeoJSON": folder / "tiles.geojson"}
    steps.run("report", hv.pl.report, tiles, written["report"], model)
    steps.run("export to GeoJSON", hv.io.write_geojson, tiles, written["GeoJSON"], shape="square")
    store = folder / "tiles.zarr"
    steps.run("export to SpatialData", lambda: hv.get.spatialdata(tiles).write(store, overwrite=True))
    sizes = {what: path.stat().st_size for what, path in written.items()}
    sizes["SpatialData"] = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    print(f"{tiles.n_obs} tiles, {', '.join(f'{what} {size / 1e6:.1f} MB' for what, size in sizes.items())}")
    return tiles, steps.table()


def at_spots(tiles: ad.AnnData, spots: ad.AnnData) -> tuple[NDArray[np.floating], int]:
    """Predictions for tiles interpolated at the spots, and the number of spots outside of the triangles."""
    values, place = hv.get.prediction(tiles).X, spots.obsm["spatial"]
    linear = LinearNDInterpolator(tiles.obsm["spatial"], values)(place)
    outside = np.isnan(linear).any(1)
    linear[outside] = NearestNDInterpolator(tiles.obsm["spatial"], values)(place[outside])
    return linear, int(outside.sum())


def agreement(tiles_by_spacing: dict[float, ad.AnnData], spots: ad.AnnData) -> pd.DataFrame:
    """Scores at the measured spots: of predictions at the spots, and at tiles of each spacing."""
    predicted = hv.get.prediction(spots)
    genes = predicted.var_names.tolist()
    measured = spots[:, genes].layers["lognorm"].toarray()
    maps: dict[str, tuple[NDArray[np.floating], int | str]] = {"the spots themselves": (np.asarray(predicted.X), "")}
    maps |= {f"{t.n_obs} tiles, {um:g} um apart": at_spots(t, spots) for um, t in tiles_by_spacing.items()}
    rows = []
    for name, (values, outside) in maps.items():
        scores = hv.metrics.summary(hv.metrics.per_gene(values, measured, genes))
        main = "PCC-200" if "PCC-200" in scores else "PCC-all"
        alike = float(np.nanmean(hv.metrics.pearson(values, predicted.X)))
        kept = {main: scores[main], "PCC-50": scores.get("PCC-50", np.nan), "MSE": scores["MSE"]}
        rows.append(
            {"predicted at": name, **kept, "correlation with prediction at spots": alike, "spots outside": outside}
        )
    table = pd.DataFrame(rows).set_index("predicted at")
    table.insert(1, "difference", table.iloc[:, 0] - table.iloc[0, 0])
    return table


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="directory to keep model, spots and outputs in, and to reuse them from"
    )
    parser.add_argument("--smoke", action="store_true", help="simulated sections, a small image, a toy encoder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.out or Path(temporary)) / ("smoke" if arguments.smoke else "her2st")
        folder.mkdir(parents=True, exist_ok=True)
        case = simulated(folder) if arguments.smoke else her2st()
        model, spots = prepare(case, folder)
        tiles = {}
        for spacing_um in case.spacings_um:
            tiles[spacing_um], took = journey(case, model, spacing_um, folder)
    print(f"\n{took.round(2).to_string(na_rep='')}\n")
    table = agreement(tiles, spots)
    print(f"{table.round(3).to_string(na_rep='')}\n")
    if not arguments.smoke:
        for name, difference in table["difference"].iloc[1:].items():
            verdict = "met" if abs(difference) <= TARGET else "missed"
            print(f"{name}: {difference:+.3f}, within {TARGET} of the spots: {verdict}")


if __name__ == "__main__":
    main()
