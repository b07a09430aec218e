"""Size of a report, and the time that a browser takes to open it.

    python benchmarks/report_size.py [--spots 4000] [--genes 200] [--smoke]

A small model predicts a simulated section with measured expression and an H&E image of 2,000 pixels a side, of which a
report is written. Opening is timed in Chromium without a network, from the request until the first map is drawn: the
median of five runs. Without a browser, only the size is printed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np

import histovar as hv

# Longest time to wait for a page, in milliseconds.
TIMEOUT = 180_000
IMAGE_SIDE, TIMES = 2000, 5
DRAWN = "window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle"


def prediction(n_spots: int, n_genes: int) -> tuple[ad.AnnData, hv.TwoStageVARST]:
    """A predicted section and its model."""
    training = hv.datasets.simulate(2, 100, n_genes, embedding_dim=32)
    query = hv.datasets.simulate(1, n_spots, n_genes, embedding_dim=32)
    config = hv.ModelConfig.default(
        n_genes, scales=(1, 4, n_genes), components=(2, 1, 1), encoder_hidden=(16, 16, 16), n_members=3, n_pcs=16
    )
    quick = {"max_epochs": 1, "enable_progress_bar": False}
    model = hv.tl.train(training, use_rep="X_histology", library_key="section", config=config, **quick)
    hv.tl.predict(query, model)
    image = query.uns["spatial"]["S1"]
    pixels = np.asarray(image["images"]["hires"])
    rows = np.linspace(0, len(pixels) - 1, IMAGE_SIDE).astype(int)
    # Grain like that of tissue, which JPEG does not compress away.
    grain = np.random.default_rng(0).normal(0, 12, (IMAGE_SIDE, IMAGE_SIDE, 1))
    image["images"]["hires"] = np.clip(pixels[np.ix_(rows, rows)] + grain, 0, 255).astype(np.uint8)
    image["scalefactors"]["tissue_hires_scalef"] *= IMAGE_SIDE / len(pixels)
    return query, model


def seconds_to_open(path: Path) -> list[float]:
    """Seconds until the map is drawn, of several runs; empty without a browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        return []
    browser_path = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser_path is None:
        return []
    seconds = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        for _ in range(TIMES):
            page = browser.new_context(offline=True).new_page()
            page.set_default_timeout(TIMEOUT)
            begin = time.monotonic()
            page.goto(path.as_uri())
            page.wait_for_function(DRAWN)
            seconds.append(time.monotonic() - begin)
            page.close()
        browser.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spots", type=int, default=4000, help="spots of the section")
    parser.add_argument("--genes", type=int, default=200, help="genes of the panel")
    parser.add_argument("--out", type=Path, help="file for the report")
    parser.add_argument("--smoke", action="store_true", help="few spots and genes, no browser, to see that it runs")
    options = parser.parse_args()
    n_spots, n_genes = (150, 20) if options.smoke else (options.spots, options.genes)
    adata, model = prediction(n_spots, n_genes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        begin = time.monotonic()
        hv.pl.report(adata, path, model)
        written = time.monotonic() - begin
        print(f"{n_spots:,} spots x {n_genes:,} genes: {path.stat().st_size / 1e6:.1f} MB, written in {written:.1f} s")
        if options.out:
            shutil.copy(path, options.out)
        seconds = [] if options.smoke else seconds_to_open(path)
        if seconds:
            print(f"opened in {statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})")
        else:
            print("not opened: no browser, or smoke mode")


if __name__ == "__main__":
    main()
