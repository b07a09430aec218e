"""Check ``pp.embed`` against an independent computation, time it, and compare layers and poolings of DINOv2.

    python benchmarks/embed.py             # her2st's patient C: agreement, speed and memory
    python benchmarks/embed.py --study     # accuracy of ridge regression by layers and pooling
    python benchmarks/embed.py --smoke     # to see that it runs: a few spots of one section

The environment variable HISTOVAR_DATA names the directory with the data.

Agreement is the cosine similarity between embeddings by ``pp.embed`` from the raw JPEGs (fields of 224 and of 448
pixels) and those in the data set, which were computed without histovar. Speed is compared with that of timm's network
alone on normalised patches in memory; the two are run by turns, so that other load slows both alike, and processor
time is given beside wall-clock time. Peak memory is that of the whole process.

``--study`` predicts the 200 most variable genes of each section by ridge regression on the other three, with the
penalty chosen by leaving out each of the three in turn; PCC-200 is Pearson's correlation, averaged over genes and
sections.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from real_data import HER2ST, data_path
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

import histovar as hv
from histovar.encoders.features import Features
from histovar.slides import Patches, open_image

MPP, PX = 0.73, 224
# Embeddings of the data set, by the width of their field in patches.
REFERENCES = {1: "X_dinov2", 2: "X_dinov2_wide"}
ALPHAS = 10.0 ** np.arange(2, 6.5, 0.5)
TARGET_COSINE, TARGET_RATE, TARGET_GB = 0.999, 0.9, 2.0


def cosine(embedding: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """Cosine similarity, mean over spots."""
    norms = np.linalg.norm(embedding, axis=1) * np.linalg.norm(reference, axis=1)
    return float(((embedding * reference).sum(1) / norms).mean())


def agreement(adata: ad.AnnData, images: dict[str, Path], weights: Path) -> pd.DataFrame:
    """Cosine similarity with the data set's own embeddings, and patches per second, of each section."""
    rows = []
    for section, image in images.items():
        part = adata[(adata.obs["section"] == section).to_numpy()].copy()
        start = time.perf_counter()
        fields = [factor * PX * MPP for factor in REFERENCES]
        hv.pp.embed(part, image=image, mpp=MPP, field_um=fields, weights=weights, device="cpu")
        seconds = time.perf_counter() - start
        row = {"section": section, "spots": part.n_obs, "patches/s": len(fields) * part.n_obs / seconds}
        for field, reference in zip(fields, REFERENCES.values(), strict=True):
            row[reference] = cosine(part.obsm[f"X_dinov2_vits14_{field:g}um"], part.obsm[reference])
        rows.append(row)
        print(row, flush=True)
    return pd.DataFrame(rows).set_index("section")


def rate(adata: ad.AnnData, image: Path, weights: Path, repeats: int, batch: int = 32) -> float:
    """Speed of ``pp.embed`` relative to the network alone: the median of paired runs.

    Loading the weights is left out of both; decoding the image is a part of ``pp.embed``'s time.
    """
    features = Features.load(hv.encoders.get("dinov2_vits14"), weights)
    network = features.module
    layers = {"indices": list(features.encoder.layers), "norm": False, "output_fmt": "NLC"}

    class Pooled(torch.nn.Module):
        """What ``pp.embed`` computes, with weights already loaded."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.network.forward_intermediates(images, **layers, intermediates_only=True, stop_early=True)
            return torch.cat([value for t in tokens for value in (t.mean(1), t.std(1, correction=0))], 1)

    pooled = Pooled().eval()
    encoder = hv.encoders.Encoder(name="loaded", module=pooled, token_width=1536)
    slide = open_image(image)
    patches = Patches(slide, adata.obsm["spatial"], PX, PX)
    ready = torch.from_numpy(np.stack([patches.read(i) for i in range(adata.n_obs)])).permute(0, 3, 1, 2)
    ready = (ready.float() / 255 - torch.tensor(encoder.mean)[:, None, None]) / torch.tensor(encoder.std)[:, None, None]
    slide.close()
    ratios = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            for i in range(0, len(ready), batch):
                pooled(ready[i : i + batch])
        bare, cpu_bare = time.perf_counter() - start, time.process_time() - cpu
        start, cpu = time.perf_counter(), time.process_time()
        hv.pp.embed(
            adata.copy(), encoder, image=image, mpp=MPP, field_um=PX * MPP, batch_size=batch, device="cpu",
            show_progress_bar=False,
        )  # fmt: skip
        ours, cpu_ours = time.perf_counter() - start, time.process_time() - cpu
        ratios.append(bare / ours)
        print(
            f"patches/s: network {len(ready) / bare:.1f}, pp.embed {len(ready) / ours:.1f}, ratio {ratios[-1]:.3f}; by "
            f"processor time {len(ready) / cpu_bare:.1f}, {len(ready) / cpu_ours:.1f}, {cpu_bare / cpu_ours:.3f}",
            flush=True,
        )
    return float(np.median(ratios))


def study(adata: ad.AnnData, images: dict[str, Path], weights: Path) -> pd.DataFrame:
    """PCC-200 for blocks and poolings of DINOv2 ViT-S/14, with fields of 112 and 224 um."""
    blocks = {"block 11": (11,), "block 8": (8,), "block 5": (5,), "block 2": (2,), "blocks 5, 8": (5, 8)}
    blocks |= {"blocks 2, 5, 8, 11": (2, 5, 8, 11)}
    encoder = hv.encoders.get("dinov2_vits14").replace(layers=(2, 5, 8, 11))
    hv.pp.embed(adata, encoder, image=images, mpp=MPP, library_key="section", weights=weights, device="cpu")
    counts = adata.X.toarray()
    values = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)
    width = encoder.token_width
    rows = []
    for name, layers in blocks.items():
        for pooling in ("mean", "mean_std"):
            columns = []
            for layer in layers:
                first = 2 * width * encoder.layers.index(layer)
                columns += range(first, first + (2 * width if pooling == "mean_std" else width))
            inputs = np.concatenate([adata.obsm[f"X_dinov2_vits14_{um}um"][:, columns] for um in (112, 224)], 1)
            rows.append({"layers": name, "pooling": pooling, "PCC-200": pcc200(inputs, values, counts, adata)})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def pcc200(inputs: NDArray, values: NDArray, counts: NDArray, adata: ad.AnnData) -> float:
    """Correlation of ridge regression, mean over held-out sections and genes; choices are made on the others."""
    sections = adata.obs["section"].astype(str).to_numpy()
    scaled = np.empty_like(inputs)
    for section in np.unique(sections):
        scaled[sections == section] = StandardScaler().fit_transform(inputs[sections == section])
    scores = []
    for held_out in np.unique(sections):
        train = sections != held_out
        detected = (counts[train] > 0).mean(0) > 0.1
        genes = np.argsort(np.where(detected, values[train].var(0), -1))[-200:]
        y = values[:, genes]
        inner = {alpha: [] for alpha in ALPHAS}
        for validation in np.unique(sections[train]):
            fit = train & (sections != validation)
            for alpha in ALPHAS:
                model = Ridge(alpha=alpha).fit(scaled[fit], y[fit])
                inner[alpha].append(
                    correlation(model.predict(scaled[sections == validation]), y[sections == validation])
                )
        best = max(ALPHAS, key=lambda alpha: np.mean(inner[alpha]))
        model = Ridge(alpha=best).fit(scaled[train], y[train])
        scores.append(correlation(model.predict(scaled[~train]), y[~train]))
    return float(np.mean(scores))


def correlation(predicted: NDArray, measured: NDArray) -> float:
    """Pearson's correlation, mean over genes."""
    return float(np.nanmean(hv.metrics.pearson(predicted, measured)))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--study", action="store_true", help="compare layers and poolings")
    parser.add_argument("--smoke", action="store_true", help="a few spots of one section")
    parser.add_argument("--repeats", type=int, default=3, help="paired runs of the speed comparison")
    parser.add_argument("--sections", nargs="+", help="some of C2, C3, C4 and C5; default all")
    parser.add_argument("--out", type=Path, help="CSV file for --study")
    arguments = parser.parse_args()
    adata = ad.read_h5ad(data_path(HER2ST))
    weights = data_path("encoders/dinov2_vits14.safetensors")
    folder = data_path("her2st/raw/data/ST-imgs")
    chosen = ["C3"] if arguments.smoke else arguments.sections
    sections = sorted(adata.obs["section"].unique()) if chosen is None else chosen
    images = {section: next((folder / section[0] / section).glob("*.jpg")) for section in sections}
    if arguments.study:
        table = study(adata, images, weights)
        print(table.round(3).to_string())
        if arguments.out is not None:
            table.to_csv(arguments.out, index=False)
        return
    first = adata[(adata.obs["section"] == sections[-1]).to_numpy()].copy()
    if arguments.smoke:
        adata = first = first[:8].copy()
    found = agreement(adata, images, weights)
    print(found.round(4).to_string())
    lowest = found[list(REFERENCES.values())].min().min()
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    ratio = rate(first, images[sections[-1]], weights, 1 if arguments.smoke else arguments.repeats)
    verdicts = {
        f"lowest cosine {lowest:.4f}, target at least {TARGET_COSINE}": lowest >= TARGET_COSINE,
        f"speed {ratio:.2f} of the network alone, target at least {TARGET_RATE}": ratio >= TARGET_RATE,
        f"peak memory {gigabytes:.2f} GB, target less than {TARGET_GB}": gigabytes < TARGET_GB,
    }
    for what, met in verdicts.items():
        print(f"{what}: {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
