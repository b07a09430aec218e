"""Compare results on a GPU with those on the CPU, and its speed with the card's rate of matrix products.

    python benchmarks/device.py                          # all parts on CUDA; meant to take 8 minutes on an H100
    python benchmarks/device.py --parts equal waits      # only these parts
    python benchmarks/device.py --device cpu --smoke     # a minute, to see that it runs: the CPU against itself

| part | what it does |
|---|---|
| equal | compares tokens, values, draws, intervals, calibration and adaptation on device and CPU; saves, loads |
| waits | counts how often the host waits for the device in a step of generation or training |
| speed | times generation and training steps of both configurations in fp32, TF32 and bf16 |
| converge | trains on device and CPU, in full and in mixed precision, and compares scores on a held-out section |
| resume | interrupts a training, continues it, and compares it with an uninterrupted one |
| processes | trains by two processes on one card, and compares it with one process and the same global batch |
| reference | trains the reference system and the default in limited time, with each her2st section held out in turn |
| compile | measures the speed-up by ``torch.compile``, with CUDA graphs and without |

The last line names the checks that failed; the exit code is then 1. ``speed.py`` has the formula by which operations
are counted, ``compare.py`` the splits and scores of "reference", for which the environment variable HISTOVAR_DATA
names the directory with her2st.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import compare
import dask.array as da
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.strategies import DDPStrategy
from speed import Table, best_time, compiling, flops, matrix_rate, products_in, spots, trained, training_step

import histovar as hv
from histovar._memory import keep_freed_memory
from histovar.model import Decoding, ModelConfig, TwoStageVARST

# Values that differ by less than this, in standard deviations of the gene, count as equal.
SAME = 1e-3
# Batch sizes, and the largest of them for the reference: generation in scale and in token order, training.
BATCHES = [64, 1024, 8192, 65_536]
MOST_OF_REFERENCE = {"scale": 8192, "token": 1024, "training": 128}
MOST_TRAINED, MOST_IN_TOKEN_ORDER = 8192, 8192
# Training of the reference system: seconds that each stage of a fold may take, and more epochs than fit into them.
REFERENCE_OPTIONS: dict[str, Any] = {"max_epochs": 200, "learning_rate": 1e-4, "precision": "bf16-mixed"}
STAGE_SECONDS = (5, 25)


@dataclass
class Bench:
    """Data, models and settings that all parts share, and their results."""

    device: torch.device
    smoke: bool
    seconds: float
    failed: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def check(self, what: str, value: float, most: float) -> None:
        """Print a number, and record the check as failed if the number is larger than allowed."""
        good = bool(value <= most)
        print(f"{'ok' if good else 'FAILED':>6}  {what}: {value:.4g} (at most {most:g})", flush=True)
        if not good:
            self.failed.append(what)

    @cached_property
    def cohort(self) -> AnnData:
        """Four simulated sections with a panel."""
        n_spots, n_genes, width = (60, 40, 16) if self.smoke else (300, 240, 512)
        adata = hv.datasets.simulate(4, n_spots, n_genes, embedding_dim=width, random_state=0)
        hv.pp.gene_panel(adata, n_genes=30 if self.smoke else 200)
        return adata

    @property
    def training(self) -> AnnData:
        """Three sections, to train on."""
        return self.cohort[self.cohort.obs["section"] != "S4"].copy()

    @property
    def query(self) -> AnnData:
        """The fourth section, held out."""
        return self.cohort[self.cohort.obs["section"] == "S4"].copy()

    def config(self, **changes: Any) -> ModelConfig:
        """The default configuration, smaller in smoke mode."""
        cut = {"n_members": 3, "prior_hidden": 32, "codebook_size": 128, "n_neighbors": (4, 8)} if self.smoke else {}
        return ModelConfig.default(30 if self.smoke else 200, **{**cut, **changes})

    def train(self, accelerator: str | None = None, **options: Any) -> TwoStageVARST:
        """Train the default configuration, on the device unless another accelerator is named."""
        quick = {"max_epochs": 1} if self.smoke else {}
        shared = {"use_rep": "X_histology", "library_key": "section", "enable_progress_bar": False}
        chosen = {"accelerator": accelerator or self.device.type, "config": self.config()}
        return hv.tl.train(self.training, **{**shared, **chosen, **quick, **options})

    @cached_property
    def model(self) -> TwoStageVARST:
        """A model trained on the CPU, with its gate open: were it shut, expected values would be the prior's alone."""
        model = self.train("cpu")
        model.var_stage.head.gate.fill_(1)
        return model

    def copy_of(self, model: TwoStageVARST) -> TwoStageVARST:
        """Copy a model by saving and loading it."""
        with tempfile.TemporaryDirectory() as directory:
            model.save(directory)
            return TwoStageVARST.load(directory)

    def gene_sds(self) -> np.ndarray:
        """Standard deviations of the genes."""
        return self.model.stage1.scales.std.cpu().numpy()


def equal(bench: Bench) -> None:
    """Compare what a model gives on the device and on the CPU."""
    model, there, sds = bench.model, str(bench.device), bench.gene_sds()

    def both(verb: Callable[..., Any], *args: Any, **options: Any) -> tuple[AnnData, AnnData]:
        return tuple(verb(bench.query, *args, device=d, copy=True, **options) for d in ("cpu", there))

    def apart(one: AnnData, other: AnnData) -> np.ndarray:
        return np.abs(hv.get.prediction(one).X - hv.get.prediction(other).X) / sds

    def differing_tokens(one: AnnData, other: AnnData) -> float:
        return float((one.obsm["histovar_tokens"] != other.obsm["histovar_tokens"]).mean())

    bench.check(
        "share of tokens of measured expression that differ", differing_tokens(*both(hv.tl.tokenize, model)), 1e-3
    )
    bench.check(
        "share of greedy tokens that differ", differing_tokens(*both(hv.tl.predict, model, decoding="greedy")), 1e-2
    )
    levels = (0.05, 0.5, 0.95)
    here, away = both(hv.tl.predict, model, quantiles=levels, n_samples=20, random_state=3)
    bench.check("expected values, s.d. of their genes", apart(here, away).max(), SAME)
    std = np.abs(hv.get.prediction(here).layers["std"] - hv.get.prediction(away).layers["std"]) / sds
    bench.check("standard deviations, s.d. of their genes", std.max(), SAME)
    cubes = [one.obsm["histovar_quantiles"] for one in (here, away)]
    bench.check(
        "share of quantiles that differ", float((np.abs(cubes[0] - cubes[1]).max(-1) / sds > SAME).mean()), 1e-2
    )
    draws = [one.obsm["histovar_samples"].mean(-1) for one in (here, away)]
    error = hv.get.prediction(here).layers["std"].clip(1e-3) * np.sqrt(2 / 20)
    bench.check(
        "means of draws, in their standard errors", float(np.sqrt((((draws[0] - draws[1]) / error) ** 2).mean())), 1.5
    )
    again = hv.tl.predict(bench.query, model, n_samples=20, random_state=3, quantiles=levels, device=there, copy=True)
    bench.check(
        "difference between draws of one seed",
        float(np.abs(again.obsm["histovar_samples"] - away.obsm["histovar_samples"]).max()),
        0,
    )
    fast = hv.tl.predict(bench.query, model, precision="bf16", device=there, copy=True)
    bench.check("bf16, mean difference, s.d. of genes", apart(away, fast).mean(), 1e-2)

    calibrated = []
    for device in ("cpu", there):
        calibrated.append(bench.copy_of(model))
        hv.tl.calibrate(bench.query, calibrated[-1], library_key="section", device=device)
    for name in ("dispersion", "depth_errors", "levels"):
        one, other = (m.var_stage.observation.get_buffer(name) for m in calibrated)
        bench.check(
            f"calibration, relative difference of {name}", float((one - other).abs().max() / one.abs().max()), 1e-2
        )

    moved = bench.copy_of(model).to(bench.device)
    loaded = bench.copy_of(moved)
    same = all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    bench.check("differences in weights saved from the device and loaded on the CPU", float(not same), 0)
    inputs = bench.query
    hv.tl.predict(inputs, moved, device="cpu")
    bench.check("prediction on the CPU by a model on the device, s.d. of genes", apart(here, inputs).max(), SAME)
    lazy = bench.query
    lazy.obsm["X_histology"] = da.from_array(np.asarray(lazy.obsm["X_histology"]), chunks=(40, -1))
    hv.tl.predict(lazy, moved, device=there)
    for slots in (lazy.obsm, lazy.layers):
        for key in [key for key, value in slots.items() if isinstance(value, da.Array)]:
            slots[key] = slots[key].compute()
    bench.check("prediction of dask arrays by a model on the device, s.d. of genes", apart(here, lazy).max(), SAME)
    measured = np.arange(bench.query.n_obs) % 3 == 0
    adapted = []
    for device in ("cpu", there):
        section = bench.query
        section.obs["measured"] = measured
        own = hv.tl.adapt(section, bench.copy_of(model), "measured", device=device)
        adapted.append(hv.tl.predict(section, own, device=device, copy=True))
    bench.check("prediction of adapted models, s.d. of genes", apart(*adapted).max(), 10 * SAME)
    retrained = hv.tl.train_stage2(
        bench.training, moved, use_rep="X_histology", library_key="section", max_epochs=1, enable_progress_bar=False,
        accelerator=bench.device.type,
    )  # fmt: skip
    bench.check(
        "validation loss after training a model that was on the device",
        retrained.history["stage2"]["val_loss"].min(),
        20,
    )


def waits(bench: Bench) -> None:
    """Count how often the host waits for the device, by the line of code that waits."""
    if bench.device.type != "cuda":
        print("        the CPU waits for nothing; tests/test_devices.py looks for waits without a device")
        return

    def count(what: str, work: Callable[[], Any], allowed: int) -> None:
        work()  # what is computed once may wait
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            work()
            torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchroniz" in str(w.message))
        bench.check(f"waits, {what} {dict(places) or ''}", sum(places.values()), allowed)

    model = bench.copy_of(bench.model).to(bench.device)
    inputs = spots(model.config, 256, bench.device)
    for order in ("scale", "token"):
        other = in_order(model, order)
        for mode in ("expected", "greedy", "sample"):
            with torch.no_grad():
                count(f"{mode}, {order} order", lambda: other.predict(inputs, Decoding(mode)), 0)  # noqa: B023
    members = model.prior_members(inputs)
    count("rates and depth", lambda: model.composition(inputs, members), 0)
    observation, composition = model.var_stage.observation, model.composition(inputs, members)
    count("moments", lambda: observation.moments(composition, "lognorm"), 0)
    for kind in ("fp32", "bf16"):
        count(f"training step, {kind}", training_step(model, 256, kind), 0)

    class CountedSteps(Callback):
        """Counts waits from the second batch of an epoch on."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            torch.cuda.set_sync_debug_mode("warn" if batch_idx else "default")

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        bench.train(max_epochs=2, callbacks=[CountedSteps()])
    torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchroniz" in str(w.message))
    print(f"        waits of Lightning's loops, two epochs of each stage: {dict(places.most_common(8))}", flush=True)


def in_order(model: TwoStageVARST, order: str) -> TwoStageVARST:
    """The same weights in another order, with the gate open, on the model's device."""
    other = TwoStageVARST(model.config.replace(order=order))
    other.load_state_dict(model.state_dict())
    other.var_stage.head.gate.fill_(1)
    return other.to(model.device).eval()


def models_of(bench: Bench) -> dict[str, TwoStageVARST]:
    """Both configurations, on the device."""
    if bench.smoke:
        cut = {"n_layers": 1, "codebook_size": 256, "feedforward": 128}
        configs = {"default": bench.config(embedding_dims=(16,)), "reference": ModelConfig.reference(**cut)}
    else:
        configs = {"default": ModelConfig.default(200, 1024), "reference": ModelConfig.reference()}
    return {name: trained(config, config.n_genes).to(bench.device) for name, config in configs.items()}


def speed(bench: Bench) -> None:
    """Time generation and training beside the matrix rate measured in the same run."""
    device, size = bench.device, 256 if bench.smoke else 8192
    kinds = ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16")
    limits = {kind: matrix_rate(kind, size, bench.seconds, device) for kind in kinds}
    print(", ".join(f"{kind} limit {rate / 1e12:.2f} TFLOP/s" for kind, rate in limits.items()), flush=True)
    table, batches = Table(limits, device), [8] if bench.smoke else BATCHES

    def measure(name: str, what: str, batch: int, work: Callable[[], Any], per_spot: float, kind: str) -> None:
        try:
            with products_in(kind):
                table.add(name, what, batch, best_time(work, bench.seconds, device), per_spot, kind)
        except torch.OutOfMemoryError:
            print(f"{name:>9} {what} {kind} batch {batch}: more than the device's memory", flush=True)
            torch.cuda.empty_cache()

    for name, model in models_of(bench).items():
        is_reference = model.config.style == "reference"
        for order in ("scale", "token"):
            other, most = in_order(model, order), MOST_OF_REFERENCE[order] if is_reference else max(BATCHES)
            most = min(most, MOST_IN_TOKEN_ORDER) if order == "token" else most
            for kind in kinds:
                generating = other.in_precision("bf16" if kind == "bf16" else "fp32")
                for batch in (b for b in batches if b <= most):
                    inputs = spots(model.config, batch, device)
                    with torch.no_grad():
                        measure(
                            name, f"expected, {order} order", batch, lambda: generating.predict(inputs),  # noqa: B023
                            flops(other), kind,
                        )  # fmt: skip
        for kind in kinds:
            for batch in (b for b in batches if b <= (MOST_OF_REFERENCE["training"] if is_reference else MOST_TRAINED)):
                step = training_step(model, batch, kind)
                measure(name, "training step, stage 2", batch, step, flops(model, True), kind)
    bench.rows += table.rows
    found = pd.DataFrame(table.rows)
    if not bench.smoke and device.type == "cuda":
        scale = found[found["what"] == "expected, scale order"]
        best = scale.groupby("model")[["share of limit", "spots/s"]].max()
        share = scale[(scale["model"] == "reference") & (scale["type"] == "bf16")]["share of limit"].max()
        bench.check("reference, bf16, scale order: shortfall from half of the bf16 limit", 0.5 - share, 0)
        bench.check("default: shortfall from 100,000 spots/s", 1e5 - best.loc["default", "spots/s"], 0)


def compiled(bench: Bench) -> None:
    """Measure the speed-up by compiling the transformer's layers."""
    if bench.smoke:
        print("        compiling takes minutes without a device: left out of smoke mode")
        return
    for name, model in models_of(bench).items():
        for mode in ("default", "reduce-overhead"):
            for batch in (64, 1024 if name == "default" else 128):
                try:
                    gains = compiling(name, model, batch, bench.seconds, mode)
                except Exception as error:  # noqa: BLE001 - compilers fail in many ways
                    print(f"{name}, batch {batch}, {mode}: not compiled ({str(error).splitlines()[0]})", flush=True)
                    continue
                for what, gain in zip(("training step", "generation"), gains, strict=True):
                    row = {"model": name, "what": f"{what}, compiled ({mode})", "batch": batch, "times as fast": gain}
                    bench.rows.append(row)


def score(bench: Bench, model: TwoStageVARST) -> float:
    """Correlation on the section held out, averaged over genes."""
    query = bench.query
    hv.tl.predict(query, model, device=str(bench.device))
    return float(hv.tl.evaluate(query)["pearson"].mean())


def converge(bench: Bench) -> None:
    """Compare scores after training on the device and on the CPU."""
    here = score(bench, bench.model)
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        if precision == "16-mixed" and bench.device.type != "cuda":
            continue
        start = time.perf_counter()
        model = bench.train(precision=precision)
        seconds = time.perf_counter() - start
        there = score(bench, model)
        print(
            f"        {precision}: mean correlation {there:.4f} in {seconds:.0f} s, on the CPU {here:.4f}", flush=True
        )
        bench.check(f"mean correlation below the CPU's, {precision}", here - there, 0.5 if bench.smoke else 0.02)


class Interruption(Callback):
    """Ends the training of stage 2 as Ctrl-C would, in its second epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook."""
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def resume(bench: Bench) -> None:
    """Compare an interrupted and continued training with an uninterrupted one."""
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, Any] = {"max_epochs": 3, "checkpoint_dir": directory}
        try:
            bench.train(**options, stage2={"callbacks": [Interruption()]})
        except KeyboardInterrupt:
            continued = bench.train(**options, resume=True)
        else:
            raise RuntimeError("the training was not interrupted")
    whole = bench.train(max_epochs=3)
    losses = [model.history["stage2"]["val_loss"].to_numpy() for model in (whole, continued)]
    bench.check("difference in number of epochs after resuming", abs(len(losses[0]) - len(losses[1])), 0)
    n = min(map(len, losses))
    bench.check("difference in loss of a resumed training", float(np.abs(losses[0][:n] - losses[1][:n]).max()), 1e-2)


WITHOUT_DROPOUT = {"dropout": 0.0, "prior_dropout": 0.0, "prior_input_dropout": 0.0}


def worker(bench: Bench, out: Path) -> None:
    """Train in one of two processes; the first writes the history."""
    strategy = DDPStrategy(process_group_backend="gloo")  # NCCL refuses two processes on one card
    config = bench.config(**WITHOUT_DROPOUT)
    model = bench.train(config=config, strategy=strategy, num_nodes=2, devices=1, batch_size=16, max_epochs=2)
    if os.environ["NODE_RANK"] == "0":
        out.write_text(json.dumps({stage: model.history[stage]["val_loss"].tolist() for stage in model.history}))


def processes(bench: Bench) -> None:
    """Train by two processes on one card, set up as two nodes of one device."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as directory:
        free.bind(("127.0.0.1", 0))
        port, out = free.getsockname()[1], Path(directory) / "history.json"
        free.close()
        command = [sys.executable, __file__, "--device", str(bench.device), "--worker", str(out)]
        command += ["--smoke"] * bench.smoke
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = [
            subprocess.Popen(command, env={**os.environ, **address, "NODE_RANK": str(rank)}) for rank in range(2)
        ]
        try:
            codes = [process.wait(timeout=600 if bench.smoke else 120) for process in started]
        finally:
            for process in started:
                process.kill()
        bench.check("processes that failed", sum(map(bool, codes)), 0)
        two = json.loads(out.read_text())
    one = bench.train(config=bench.config(**WITHOUT_DROPOUT), batch_size=32, max_epochs=2).history
    for stage, losses in two.items():
        apart = np.abs(np.array(losses) - one[stage]["val_loss"].to_numpy()).max()
        bench.check(f"difference in loss between two processes and one, {stage}", float(apart), 1e-2)


def reference(bench: Bench) -> None:
    """Train the reference system and the default, and score them on held-out sections as ``compare.py`` does."""
    name = "simulated" if bench.smoke else "her2st"
    try:
        data = compare.load(name, argparse.Namespace(smoke=bench.smoke, curve=False, group_key=None))
    except SystemExit as missing:
        print(f"not trained: {missing}")
        return
    rows: list[dict[str, Any]] = []
    methods = [compare.OURS, compare.REFERENCE if bench.smoke else compare.WHOLE_REFERENCE]
    for held_out, train, query in compare.splits(data, 1 if bench.smoke else None, pairs=False):
        hv.pp.gene_panel(train, n_genes=200, min_fraction=data.min_fraction)
        for method in methods:
            options: dict[str, Any] = {"accelerator": bench.device.type}
            if bench.smoke:
                options |= {"max_epochs": 1, "limit_train_batches": 1}
            elif method != compare.OURS:
                options |= REFERENCE_OPTIONS
                for stage, seconds in enumerate(STAGE_SECONDS, 1):
                    options[f"stage{stage}"] = {"callbacks": [Timer(timedelta(seconds=seconds))]}
            for _, scores in compare.run(method, train, query, data, ["lognorm"], 0, options, 0):
                rows.append({"method": method, "held out": held_out, "seed": 0, **scores})
    bench.rows += rows
    print(compare.table(pd.DataFrame(rows)).to_string(float_format=lambda v: f"{v:.3f}"))


PARTS: dict[str, Callable[[Bench], None]] = {
    "equal": equal,
    "waits": waits,
    "speed": speed,
    "converge": converge,
    "resume": resume,
    "processes": processes,
    "reference": reference,
    "compile": compiled,
}


# Default parts of smoke mode; the tests train by two processes, and train the reference, on the CPU.
QUICK = ("equal", "waits", "speed", "resume")


def main() -> None:
    """Run the parts and name the checks that failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="default all; of --smoke, the quick ones")
    parser.add_argument("--seconds", type=float, default=0.3, help="shortest time of each measurement of speed")
    parser.add_argument("--minutes", type=float, default=7, help="no part starts after this time")
    parser.add_argument("--out", type=Path, help="CSV file for the measurements")
    parser.add_argument("--smoke", action="store_true", help="small models and data, to see that it runs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing measured; --device cpu --smoke shows that the script runs")
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    keep_freed_memory()
    seconds = 0.0 if arguments.smoke else arguments.seconds
    bench = Bench(arguments.device, arguments.smoke, seconds)
    if arguments.worker:
        worker(bench, arguments.worker)
        return
    if arguments.device.type == "cuda":
        print(f"{torch.cuda.get_device_name(arguments.device)}, torch {torch.__version__}", flush=True)
    begin = time.perf_counter()
    for part in arguments.parts or (QUICK if arguments.smoke else PARTS):
        start = time.perf_counter()
        if start - begin > 60 * arguments.minutes and not arguments.smoke:
            bench.failed.append(f"{part} (no time left; run it alone)")
            continue
        print(f"\n== {part}", flush=True)
        try:
            PARTS[part](bench)
        except Exception:  # noqa: BLE001 - the other parts are worth their time on a device
            traceback.print_exc()
            bench.failed.append(f"{part} (see above)")
        print(f"== {part}: {time.perf_counter() - start:.0f} s", flush=True)
        if arguments.out:
            pd.DataFrame(bench.rows).to_csv(arguments.out, index=False)
    if bench.failed:
        raise SystemExit(f"failed: {'; '.join(bench.failed)}")


if __name__ == "__main__":
    main()
