"""Whether a GPU gives what the CPU gives, and how fast it is beside its own matrix products.

    python benchmarks/device.py                          # all parts on CUDA; meant to take 8 minutes on an H100
    python benchmarks/device.py --parts equal waits      # some of them
    python benchmarks/device.py --device cpu --smoke     # the CPU against itself, to see that it runs: a minute

| part | what it does |
|---|---|
| equal | tokens, values, draws, intervals, calibration, adaptation there and on the CPU; saving and loading across |
| waits | counts how often a step of generation or training has the host wait for the device |
| speed | generation and training steps of both configurations in fp32, TF32 and bf16, as shares of the matrix rate |
| converge | trains there and on the CPU, in full and in mixed precision, and compares scores on a section held out |
| resume | interrupts a training, continues it, and compares with one that was not interrupted |
| processes | two processes on one card, compared with one of the same global batch |
| reference | the whole reference system and the default, each her2st section held out in turn, in a limited time |
| compile | how many times as fast ``torch.compile`` makes generation and training, with CUDA graphs and without |

The last lines say which checks failed, and so does the exit code. ``speed.py`` has the formula of operations, and
``compare.py`` the splits and scores.
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

# Values as far from the CPU's as this, in standard deviations of the gene, are the same.
SAME = 1e-3
# Sizes of batches, and largest ones of the reference: generated in scale and in token order, and trained on.
BATCHES = [64, 1024, 8192, 65_536]
MOST_OF_REFERENCE = {"scale": 8192, "token": 1024, "training": 128}
MOST_TRAINED, MOST_IN_TOKEN_ORDER = 8192, 8192
# The reference system's training: more epochs than it takes, and how many seconds a stage and fold may take.
REFERENCE_OPTIONS: dict[str, Any] = {"max_epochs": 200, "learning_rate": 1e-4, "precision": "bf16-mixed"}
SECONDS_OF_STAGES = (5, 25)


@dataclass
class Bench:
    """What all parts need, and what they found."""

    device: torch.device
    smoke: bool
    data: Path
    seconds: float
    failed: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def check(self, what: str, value: float, most: float) -> None:
        """Print a number, and keep in mind if it is larger than it may be."""
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
        """Three of them."""
        return self.cohort[self.cohort.obs["section"] != "S4"].copy()

    @property
    def query(self) -> AnnData:
        """The fourth."""
        return self.cohort[self.cohort.obs["section"] == "S4"].copy()

    def config(self, **changes: Any) -> ModelConfig:
        """The default, cut in smoke mode."""
        cut = {"n_members": 3, "prior_hidden": 32, "codebook_size": 128, "n_neighbors": (4, 8)} if self.smoke else {}
        return ModelConfig.default(30 if self.smoke else 200, **{**cut, **changes})

    def train(self, accelerator: str | None = None, **options: Any) -> TwoStageVARST:
        """The default, trained on the device unless another accelerator is named."""
        quick = {"max_epochs": 1} if self.smoke else {}
        shared = {"use_rep": "X_histology", "library_key": "section", "enable_progress_bar": False}
        chosen = {"accelerator": accelerator or self.device.type, "config": self.config()}
        return hv.tl.train(self.training, **{**shared, **chosen, **quick, **options})

    @cached_property
    def model(self) -> TwoStageVARST:
        """Trained on the CPU; its gate is open, or expected values would be the prior's."""
        model = self.train("cpu")
        model.var_stage.head.gate.fill_(1)
        return model

    def copy_of(self, model: TwoStageVARST) -> TwoStageVARST:
        """A model saved and loaded."""
        with tempfile.TemporaryDirectory() as directory:
            model.save(directory)
            return TwoStageVARST.load(directory)

    def gene_sds(self) -> np.ndarray:
        """Standard deviations of the genes."""
        return self.model.stage1.scales.std.cpu().numpy()


def equal(bench: Bench) -> None:
    """What a model gives on the device and on the CPU."""
    model, there, sds = bench.model, str(bench.device), bench.gene_sds()

    def both(verb: Callable[..., Any], *args: Any, **options: Any) -> tuple[AnnData, AnnData]:
        return tuple(verb(bench.query, *args, device=d, copy=True, **options) for d in ("cpu", there))

    def apart(one: AnnData, other: AnnData) -> np.ndarray:
        return np.abs(hv.get.prediction(one).X - hv.get.prediction(other).X) / sds

    def other_tokens(one: AnnData, other: AnnData) -> float:
        return float((one.obsm["histovar_tokens"] != other.obsm["histovar_tokens"]).mean())

    bench.check("share of other tokens of measured expression", other_tokens(*both(hv.tl.tokenize, model)), 1e-3)
    bench.check("share of other greedy tokens", other_tokens(*both(hv.tl.predict, model, decoding="greedy")), 1e-2)
    levels = (0.05, 0.5, 0.95)
    here, away = both(hv.tl.predict, model, quantiles=levels, n_samples=20, random_state=3)
    bench.check("expected values, s.d. of their genes", apart(here, away).max(), SAME)
    std = np.abs(hv.get.prediction(here).layers["std"] - hv.get.prediction(away).layers["std"]) / sds
    bench.check("standard deviations, s.d. of their genes", std.max(), SAME)
    cubes = [one.obsm["histovar_quantiles"] for one in (here, away)]
    bench.check("share of other quantiles", float((np.abs(cubes[0] - cubes[1]).max(-1) / sds > SAME).mean()), 1e-2)
    draws = [one.obsm["histovar_samples"].mean(-1) for one in (here, away)]
    error = hv.get.prediction(here).layers["std"].clip(1e-3) * np.sqrt(2 / 20)
    bench.check(
        "means of draws, in their standard errors", float(np.sqrt((((draws[0] - draws[1]) / error) ** 2).mean())), 1.5
    )
    again = hv.tl.predict(bench.query, model, n_samples=20, random_state=3, quantiles=levels, device=there, copy=True)
    bench.check(
        "draws of the same seed", float(np.abs(again.obsm["histovar_samples"] - away.obsm["histovar_samples"]).max()), 0
    )
    fast = hv.tl.predict(bench.query, model, precision="bf16", device=there, copy=True)
    bench.check("bf16, mean, s.d. of genes", apart(away, fast).mean(), 1e-2)

    calibrated = []
    for device in ("cpu", there):
        calibrated.append(bench.copy_of(model))
        hv.tl.calibrate(bench.query, calibrated[-1], library_key="section", device=device)
    for name in ("dispersion", "depth_errors", "levels"):
        one, other = (m.var_stage.observation.get_buffer(name) for m in calibrated)
        bench.check(f"calibration, {name}", float((one - other).abs().max() / one.abs().max()), 1e-2)

    moved = bench.copy_of(model).to(bench.device)
    loaded = bench.copy_of(moved)
    same = all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    bench.check("weights saved from the device and loaded on the CPU", float(not same), 0)
    inputs = bench.query
    hv.tl.predict(inputs, moved, device="cpu")
    bench.check("of a model that lives on the device, predicted on the CPU", apart(here, inputs).max(), SAME)
    lazy = bench.query
    lazy.obsm["X_histology"] = da.from_array(np.asarray(lazy.obsm["X_histology"]), chunks=(40, -1))
    hv.tl.predict(lazy, moved, device=there)
    for slots in (lazy.obsm, lazy.layers):
        for key in [key for key, value in slots.items() if isinstance(value, da.Array)]:
            slots[key] = slots[key].compute()
    bench.check("of dask arrays, by a model that lives on the device", apart(here, lazy).max(), SAME)
    measured = np.arange(bench.query.n_obs) % 3 == 0
    adapted = []
    for device in ("cpu", there):
        section = bench.query
        section.obs["measured"] = measured
        own = hv.tl.adapt(section, bench.copy_of(model), "measured", device=device)
        adapted.append(hv.tl.predict(section, own, device=device, copy=True))
    bench.check("adapted to measured spots, s.d. of genes", apart(*adapted).max(), 10 * SAME)
    retrained = hv.tl.train_stage2(
        bench.training, moved, use_rep="X_histology", library_key="section", max_epochs=1, enable_progress_bar=False,
        accelerator=bench.device.type,
    )  # fmt: skip
    bench.check(
        "loss after training a model that lived on the device", retrained.history["stage2"]["val_loss"].min(), 20
    )


def waits(bench: Bench) -> None:
    """How often the host waits for the device, by the line that makes it."""
    if bench.device.type != "cuda":
        print("        the CPU waits for nothing; tests/test_devices.py looks for waits without a device")
        return

    def count(what: str, work: Callable[[], Any], allowed: int) -> None:
        work()  # what is prepared once may wait
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
    """The same weights in another order, gate open, where the model is."""
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
    """Generation and training beside the matrix rate of the same run."""
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
        bench.check("reference, bf16, scale order: what is missing of half of the bf16 limit", 0.5 - share, 0)
        bench.check("default: what is missing of 100,000 spots/s", 1e5 - best.loc["default", "spots/s"], 0)


def compiled(bench: Bench) -> None:
    """What compiling the transformer's layers gains: a row for each, in the table of speed."""
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
    """Scores of trainings there and on the CPU."""
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
        bench.check(f"correlation less than the CPU's, {precision}", here - there, 0.5 if bench.smoke else 0.02)


class Interruption(Callback):
    """Ends the training of stage 2 as Ctrl-C would, in its second epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook."""
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def resume(bench: Bench) -> None:
    """A training that was interrupted, and one that was not."""
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
    bench.check("epochs more or fewer after resuming", abs(len(losses[0]) - len(losses[1])), 0)
    n = min(map(len, losses))
    bench.check("loss of a resumed training", float(np.abs(losses[0][:n] - losses[1][:n]).max()), 1e-2)


WITHOUT_DROPOUT = {"dropout": 0.0, "prior_dropout": 0.0, "prior_input_dropout": 0.0}


def worker(bench: Bench, out: Path) -> None:
    """One of two processes; the first writes the history."""
    strategy = DDPStrategy(process_group_backend="gloo")  # NCCL refuses two processes on one card
    config = bench.config(**WITHOUT_DROPOUT)
    model = bench.train(config=config, strategy=strategy, num_nodes=2, devices=1, batch_size=16, max_epochs=2)
    if os.environ["NODE_RANK"] == "0":
        out.write_text(json.dumps({stage: model.history[stage]["val_loss"].tolist() for stage in model.history}))


def processes(bench: Bench) -> None:
    """Two processes on one card, as two nodes of one device would be."""
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
        bench.check(f"loss of two processes less one's, {stage}", float(apart), 1e-2)


def reference(bench: Bench) -> None:
    """The reference system and the default on held-out sections, as ``compare.py`` scores them."""
    name = "simulated" if bench.smoke else "her2st"
    if name == "her2st" and not (bench.data / compare.NAMED[name].file).is_file():
        print(f"no her2st in {bench.data}: not trained; set HISTOVAR_DATA or --data")
        return
    wanted = argparse.Namespace(data=bench.data, smoke=bench.smoke, curve=False, group_key=None)
    data, rows = compare.load(name, wanted), []
    methods = [compare.OURS, compare.REFERENCE if bench.smoke else compare.WHOLE_REFERENCE]
    for held_out, train, query in compare.splits(data, 1 if bench.smoke else None, pairs=False):
        hv.pp.gene_panel(train, n_genes=200, min_fraction=data.min_fraction)
        for method in methods:
            options: dict[str, Any] = {"accelerator": bench.device.type}
            if bench.smoke:
                options |= {"max_epochs": 1, "limit_train_batches": 1}
            elif method != compare.OURS:
                options |= REFERENCE_OPTIONS
                for stage, seconds in enumerate(SECONDS_OF_STAGES, 1):
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


# What smoke mode runs unless told otherwise; tests have trainings by two processes, and of the reference.
QUICK = ("equal", "waits", "speed", "resume")


def main() -> None:
    """Run the parts, and say what failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="all by default; of --smoke, the quick ones")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HISTOVAR_DATA", "../shared/data")))
    parser.add_argument("--seconds", type=float, default=0.3, help="least time of each measurement of speed")
    parser.add_argument("--minutes", type=float, default=7, help="no part is begun later than this")
    parser.add_argument("--out", type=Path, help="CSV file for the measurements")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing measured; --device cpu --smoke shows that the script runs")
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    keep_freed_memory()
    seconds = 0.0 if arguments.smoke else arguments.seconds
    bench = Bench(arguments.device, arguments.smoke, arguments.data, seconds)
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
