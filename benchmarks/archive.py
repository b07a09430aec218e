"""Predict a zarr store of a million spots into another with two dask workers: time, memory, recovery from kills.

    python benchmarks/archive.py                  # 1,000,000 spots: half an hour on two cores, 5 GB of disk
    python benchmarks/archive.py --niche          # niche features alone
    python benchmarks/archive.py --smoke          # to see that it runs

The run is killed when half of the chunks are written, and started again; in the second half one worker is killed. Then
some sections are predicted in memory, and the two predictions compared. Memory is the sum of resident memory over the
client and the workers, sampled four times a second in both halves. The model is a small one (40 genes, one layer 32
wide, 512 codes), so that reading, neighbourhoods, scheduling and writing take most of the time; ``--full`` takes the
default model.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import anndata as ad
import dask
import numpy as np
import pandas as pd
import psutil
import zarr
from smoke import quick_options

import histovar as hv
from histovar.anndata_io import zarr_store

WIDTH = 1024
# By default, workers of dask.distributed return freed memory to the system at once, and spend their time asking for it.
ENVIRONMENT = "distributed.nanny.pre-spawn-environ"
KEEP_MEMORY = {f"{ENVIRONMENT}.MALLOC_TRIM_THRESHOLD_": 2**26, f"{ENVIRONMENT}.MALLOC_MMAP_THRESHOLD_": 2**25}


def make_store(path: Path, n_spots: int, section_size: int, chunk: int) -> None:
    """Write sections of spots on grids, with float16 embeddings as archives keep them, chunk by chunk."""
    side = int(np.ceil(section_size**0.5))
    number = np.arange(n_spots)
    obs = pd.DataFrame({"section": pd.Categorical((number // section_size).astype(str))}, index=number.astype(str))
    adata = ad.AnnData(obs=obs)
    adata.obsm["spatial"] = np.stack(np.divmod(number % section_size, side), 1).astype(np.float32)
    adata.write_zarr(path)
    array = zarr.open_group(path, mode="r+")["obsm"].create_array(
        "X_histology", shape=(n_spots, WIDTH), chunks=(chunk, WIDTH), dtype="float16", compressors=None
    )
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    sight = np.random.default_rng(0).normal(size=(12, WIDTH))
    for start in range(0, n_spots, chunk):
        rng = np.random.default_rng(start)
        place = adata.obsm["spatial"][start : start + chunk] / side
        waves = np.sin(place @ np.random.default_rng(1).normal(size=(2, 12)) * 9 + start // section_size)
        array[start : start + chunk] = (waves @ sight + rng.normal(size=(len(place), WIDTH))).astype(np.float16)
    zarr.consolidate_metadata(path)


def make_model(path: Path, full: bool, smoke: bool) -> None:
    """Train and save a model on a few simulated spots: what it predicts does not matter here."""
    adata = hv.datasets.simulate(3, 200, 260, embedding_dim=WIDTH, random_state=0)
    n_genes = 200 if full else 40
    hv.pp.gene_panel(adata, n_genes=n_genes)
    narrow: dict[str, Any] = {} if full else {"width": 32, "n_layers": 1, "feedforward": 128, "codebook_size": 512}
    config = hv.ModelConfig.default(n_genes, WIDTH, **narrow)
    options = {"config": config, "max_epochs": 2, "enable_progress_bar": False}
    options |= quick_options(n_genes) if smoke else {}
    hv.tl.train(adata, use_rep="X_histology", library_key="section", **options).save(path)


class Memory(threading.Thread):
    """Peak resident memory of a process and its children, sampled until it ends.

    Parameters
    ----------
    pid
        The process.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.peak, self.parts = psutil.Process(pid), 0.0, (0.0, 0.0)
        self.start()

    def run(self) -> None:
        """Sample until the process ends."""
        while self.process.is_running():
            with suppress(psutil.Error):
                own, others = self.process.memory_info().rss / 1e9, 0.0
                for child in self.process.children(recursive=True):
                    with suppress(psutil.Error):
                        others += child.memory_info().rss / 1e9
                if own + others > self.peak:
                    self.peak, self.parts = own + others, (own, others)
            time.sleep(0.25)


def n_written(part: Path) -> int:
    """Number of chunks of an unfinished store that are written."""
    done = part / zarr_store.DONE
    return len(list(done.iterdir())) if done.is_dir() else 0


def stream_store(
    source: Path, model_path: Path, out: Path, chunk: int, kill_worker_at: int | None, report: Any
) -> None:
    """Predict with two workers; kill one of them when `kill_worker_at` chunks are written."""
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    model = hv.TwoStageVARST.load(model_path)
    start = time.perf_counter()
    adata = zarr_store.read_zarr(source, model.registry["genes"], chunk)
    with (
        dask.config.set(KEEP_MEMORY),
        suppress(TimeoutError),  # a worker that is being started again closes slowly
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        hv.tl.predict(adata, model, library_key="section")
        del adata.obsm["X_histology"]
        planned = time.perf_counter() - start
        part = out.with_name(f"{out.name}.part")
        if kill_worker_at is not None:
            victim = next(iter(client.run(os.getpid).values()))

            def kill() -> None:
                while n_written(part) < kill_worker_at:
                    time.sleep(0.1)
                os.kill(victim, signal.SIGKILL)
                print(f"worker killed with {n_written(part)} chunks written", flush=True)

            threading.Thread(target=kill, daemon=True).start()
        zarr_store.write_zarr(adata, out, {"benchmark": "archive"})
        report.put((planned, time.perf_counter() - start))


def niche(source: Path, chunk: int) -> None:
    """Time and memory of niche features, of which each chunk is computed and dropped."""
    memory = Memory(os.getpid())
    start = time.perf_counter()
    adata = zarr_store.read_zarr(source, [], chunk)
    hv.pp.niche(adata, use_rep="X_histology", library_key="section")
    planned = time.perf_counter() - start
    features = adata.obsm["histovar_niche"]
    features.map_blocks(lambda x: x.mean(keepdims=True), chunks=(1, 1)).compute(scheduler="threads", num_workers=2)
    print(
        f"niche features of {adata.n_obs:,} spots: {time.perf_counter() - start:.0f} s, {planned:.0f} s of it for "
        f"neighbours; peak {memory.peak:.2f} GB"
    )


def compare(source: Path, model_path: Path, out: Path, section_size: int, sections: list[int]) -> None:
    """Largest difference between the store and whole sections predicted in memory."""
    model = hv.TwoStageVARST.load(model_path)
    written, stored = ad.experimental.read_lazy(out), zarr.open_group(source, mode="r")
    for number in sections:
        rows = slice(number * section_size, (number + 1) * section_size)
        place, embedding = (np.asarray(stored["obsm"][key][rows]) for key in ("spatial", "X_histology"))
        section = ad.AnnData(obs=pd.DataFrame({"section": "0"}, index=np.arange(len(place)).astype(str)))
        section.obsm["spatial"], section.obsm["X_histology"] = place, embedding
        hv.tl.predict(section, model, library_key="section")
        difference = np.abs(section.obsm["histovar"] - np.asarray(written.layers["histovar"][rows])).max()
        print(f"section {number}: largest difference from the prediction in memory {difference:.1e}")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--spots", type=int, default=1_000_000)
    parser.add_argument("--section-size", type=int, default=10_000, help="spots of a section")
    parser.add_argument("--chunk", type=int, default=2048, help="spots of a chunk")
    parser.add_argument("--full", action="store_true", help="the default model instead of the small one")
    parser.add_argument("--niche", action="store_true", help="measure niche features alone")
    parser.add_argument("--scratch", type=Path, default=Path("archive_output"), help="directory for the stores")
    parser.add_argument("--smoke", action="store_true", help="2,000 spots, to see that it runs")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.smoke:
        arguments.spots, arguments.section_size, arguments.chunk = 600, 200, 60
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    source, model_path, out = (arguments.scratch / name for name in ("in.zarr", "model", "out.zarr"))
    if not source.exists():
        make_store(source, arguments.spots, arguments.section_size, arguments.chunk)
    if arguments.niche:
        niche(source, arguments.chunk)
        return
    if not model_path.exists():
        make_model(model_path, arguments.full, arguments.smoke)
    part = out.with_name(f"{out.name}.part")
    for old in (out, part):
        shutil.rmtree(old, ignore_errors=True)
    n_chunks = -(-arguments.spots // arguments.chunk)
    context = multiprocessing.get_context("spawn")
    report = context.Queue()
    begin = time.perf_counter()

    def run(kill_worker_at: int | None) -> Any:
        process = context.Process(
            target=stream_store, args=(source, model_path, out, arguments.chunk, kill_worker_at, report)
        )
        process.start()
        return process

    first = run(None)
    memories = [Memory(first.pid)]
    while first.is_alive() and n_written(part) < n_chunks // 2:
        time.sleep(0.1)
    for process in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
        process.kill()
    first.join()
    print(
        f"run killed after {time.perf_counter() - begin:.0f} s, {n_written(part)} of {n_chunks} chunks written",
        flush=True,
    )
    second = run(3 * n_chunks // 4)
    memories.append(Memory(second.pid))
    planned, seconds = report.get()
    second.join()
    (peak, own, workers), (other, _, _) = sorted([(m.peak, *m.parts) for m in memories], reverse=True)
    total = time.perf_counter() - begin
    print(
        f"continued: {seconds:.0f} s, {planned:.0f} s of it to plan; {arguments.spots:,} spots in {total:.0f} s in "
        f"all, {arguments.spots / total:.0f} a second; peak {peak:.2f} GB: {own:.2f} in the client, "
        f"{workers:.2f} in the workers ({other:.2f} GB in the other half)"
    )
    n_sections = arguments.spots // arguments.section_size
    compare(source, model_path, out, arguments.section_size, [0, n_sections // 2, n_sections - 1])


if __name__ == "__main__":
    main()
