"""Count what becomes of models, predictions and trainings under injected faults, and of wrong calls.

    python benchmarks/faults.py            # all parts
    python benchmarks/faults.py --smoke    # a few of the cases, to see that it runs
    python benchmarks/faults.py --only cards kills

Faults are kills, full disks, damaged and hostile files, and processes that write to one place. A table has the number
of cases of each outcome:

whole    as without the fault; for calls, a valid call that was done
refused  an error of one line (ValueError, FileNotFoundError); for interrupted commands, exit code 130
unseen   other numbers than without the fault, all finite, where the file format has no checksums
wrong    anything else: another error, a mixture of two models, numbers that are not finite, more than ten seconds, an
         earlier model that is lost; for calls, see ``fault_parts/arguments.py``

The exit status is 1 if any case is wrong. Faults of saved models are in this file, all others in ``fault_parts``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from anndata import AnnData
from fault_parts import arguments, broken_objects
from fault_parts.files import files
from fault_parts.interrupts import interrupts
from fault_parts.streams import streams
from fault_parts.trainings import resume, trainings

import histovar as hv
from histovar.model.card import content_digest
from histovar.model.checkpoint import verify

MOST_SECONDS = 10
# Share of the cases that smoke mode runs, at least one of every kind.
SMOKE_SHARE = 0.02
# Models of formats 1 to 5, which have no checksums; none if only this folder was copied.
OLD_MODELS = sorted((Path(__file__).parents[1] / "tests" / "data").glob("model-*"))
KEYS = {"use_rep": "X_histology", "spatial_key": "spatial", "library_key": "section"}

DELETED = object()
DEEP: Any = "deep"
for _ in range(200):
    DEEP = [DEEP]
# Values that replace a field of a model's card.
CORRUPTIONS = {
    "deleted": DELETED,
    "null": None,
    "negative": -1,
    "zero": 0,
    "huge": 10**12,
    "beyond 64 bits": 10**30,
    "huge float": 1e300,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "fraction": 0.5,
    "true": True,
    "text": "text",
    "empty text": "",
    "NUL": "a\0b",
    "list": [1, 2],
    "empty list": [],
    "long list": [1] * 10_000,
    "dictionary": {"a": 1},
    "empty dictionary": {},
    "nested": DEEP,
}


class Setting:
    """Two models with the same stage 1, a held-out section, and the first model's prediction of it."""

    def __init__(self, scratch: Path, rng: np.random.Generator) -> None:
        self.scratch, self.rng = scratch, rng
        adata = hv.datasets.simulate(4, 60, 40, embedding_dim=16, random_state=1)
        held_out = adata.obs["section"] == "S4"
        self.query: AnnData = adata[held_out].copy()
        self.training = adata[~held_out].copy()
        hv.pp.gene_panel(self.training, n_genes=30)
        self.config = config = hv.ModelConfig.default(
            30,
            scales=(1, 4, 10, 30),
            components=(2, 1, 1, 1),
            encoder_hidden=(16, 16, 16, 16),
            codebook_size=128,
            codebook_dim=16,
            n_neighbors=(4, 8),
            n_pcs=8,
            width=32,
            feedforward=64,
            n_members=3,
            prior_hidden=32,
        )
        self.options = {"use_rep": "X_histology", "library_key": "section", "config": config, "max_epochs": 1}
        self.keys = KEYS
        self.models = [hv.tl.train(self.training.copy(), random_state=0, **self.options, enable_progress_bar=False)]
        self.models[0].save(scratch / "first")
        self.models.append(hv.TwoStageVARST.load(scratch / "first"))
        with torch.no_grad():
            self.models[1].stage2.observation.dispersion.mul_(2)  # type: ignore[union-attr]
        self.models[1].save(scratch / "second")
        self.digests = [verify(scratch / name) for name in ("first", "second")]
        self.expected = self.predict(self.models[0])

    def fresh_copy(self, name: str) -> Path:
        """Copy the first model to a directory, and add a file of the user."""
        path = self.scratch / name
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.scratch / "first", path)
        (path / "notes.txt").write_text("of the user")
        return path

    def objects(self) -> arguments.Objects:
        """Objects for the wrong calls of ``fault_parts``."""
        return arguments.Objects(self.training.copy(), self.query.copy(), self.models[0], self.config)

    def predict(self, model: hv.TwoStageVARST) -> np.ndarray:
        """Mean expression of the held-out section, (n_spots, n_genes)."""
        return np.asarray(hv.tl.predict(self.query, model, **KEYS, copy=True).obsm["histovar"])  # type: ignore

    def outcome(self, path: Path, *, same: bool = False) -> str:
        """Load the model at a path, predict, and tell the outcome; with `same`, it must predict as the first model."""
        start = time.monotonic()
        try:
            model = hv.TwoStageVARST.load(path)
        except (ValueError, FileNotFoundError) as error:
            lines = str(error).splitlines()
            return "refused" if len(lines) == 1 and time.monotonic() - start < MOST_SECONDS else f"refused in {lines}"
        except BaseException as error:  # noqa: BLE001
            return f"load: {error!r}"
        try:
            prediction = self.predict(model)
        except BaseException as error:  # noqa: BLE001
            return f"predict: {error!r}"
        if time.monotonic() - start > MOST_SECONDS:
            return "slow"
        if not np.isfinite(prediction).all() or (same and not np.array_equal(prediction, self.expected)):
            return "another prediction"
        return "whole"

    def whole_outcome(self, path: Path) -> str:
        """Outcome for a directory to which one of the two models was saved: a mixture of both is wrong."""
        try:
            if (path / "notes.txt").exists() and verify(path) not in self.digests:
                return "a mixture"
        except (ValueError, FileNotFoundError):
            return "refused"
        return self.outcome(path)


def fields_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of every field of a card; of lists, those of the first two values and the last."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(i, value[i]) for i in sorted({0, 1, len(value) - 1} & set(range(len(value))))]
    for name, item in items:
        yield (*path, name)
        yield from fields_of(item, (*path, name))


def corrupt(card: Any, path: tuple, value: Any) -> Any:
    changed = deepcopy(card)
    place = changed
    for name in path[:-1]:
        place = place[name]
    if value is DELETED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


def cards(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Replace each field of a model's card by each corruption."""
    for what, source, sign, share_of_source in (
        ("cards, edited", setting.scratch / "first", False, share),
        ("cards, edited and signed anew", setting.scratch / "first", True, share),
        *((f"cards of {path.name}", path, False, share / len(OLD_MODELS)) for path in OLD_MODELS),
    ):
        path = setting.scratch / "card"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)
        card = json.loads((path / "model.json").read_text())
        for field in fields_of(card):
            for value in CORRUPTIONS.values():
                if setting.rng.random() < share_of_source:
                    changed = corrupt(card, field, value)
                    if changed == card:
                        continue
                    if sign and field != ("sha256",):
                        changed["sha256"] = content_digest(changed)
                    (path / "model.json").write_text(json.dumps(changed))
                    outcome = setting.outcome(path, same="sha256" in card and not sign)
                    yield what, outcome if outcome in ("whole", "refused") else f"{field}={str(value)[:20]}: {outcome}"


def in_child(function: Callable[[], object]) -> int:
    """Run a function in a forked process, and return the process id."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    return pid


def kills(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Kill a save at a random moment: over a model, and to a new directory."""
    path = setting.fresh_copy("killed")
    start = time.monotonic()
    setting.models[1].save(path)
    seconds = time.monotonic() - start
    n_killed = i = 0
    while n_killed < round(90 * share):
        i += 1
        is_new = i % 3 == 0
        to = setting.scratch / f"new{i}" if is_new else path
        pid = in_child(lambda model=setting.models[i % 2], to=to: model.save(to))  # type: ignore[misc]
        time.sleep(setting.rng.uniform(0, 1.1 * seconds))
        os.kill(pid, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            continue  # it had ended
        n_killed += 1
        outcome = setting.whole_outcome(to)
        if not is_new and outcome == "refused":
            outcome = "the earlier model is lost"
        yield "kills, to a new directory" if is_new else "kills, over a model", outcome
    setting.models[0].save(path)
    names = sorted(file.name for file in path.iterdir())
    if names != ["README.md", "model.json", "notes.txt", "stage1.safetensors", "stage2.safetensors"]:
        yield "kills, over a model", f"left {names}"


def flips(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Flip one bit of one file."""
    for _ in range(round(200 * share)):
        path = setting.fresh_copy("flipped")
        file = setting.rng.choice([f for f in sorted(path.iterdir()) if f.name not in ("README.md", "notes.txt")])
        content = bytearray(file.read_bytes())
        content[setting.rng.integers(len(content))] ^= 1 << int(setting.rng.integers(8))
        file.write_bytes(content)
        yield f"flips, {file.name}", setting.outcome(path, same=True)


def truncations(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Cut one file short."""
    for _ in range(round(30 * share)):
        path = setting.fresh_copy("cut")
        file = setting.rng.choice([f for f in sorted(path.iterdir()) if f.name not in ("README.md", "notes.txt")])
        content = file.read_bytes()
        file.write_bytes(content[: setting.rng.integers(len(content))])
        yield "truncations", setting.outcome(path)


def writers(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Save to one directory by two processes at once, while a third reads."""
    path = setting.fresh_copy("shared")
    for _ in range(round(30 * share)):
        pids = [in_child(lambda model=model: model.save(path)) for model in setting.models]  # type: ignore[misc]
        outcome = setting.whole_outcome(path)
        yield "two writers, read meanwhile", outcome if outcome == "whole" else f"read: {outcome}"
        for pid in pids:
            os.waitpid(pid, 0)
        outcome = setting.whole_outcome(path)
        yield "two writers, afterwards", outcome if outcome == "whole" else f"left: {outcome}"


def full_disk(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Save over a model on disks of increasing size, most of which have too little room."""
    size = sum(file.stat().st_size for file in (setting.scratch / "first").iterdir())
    disk = setting.scratch / "disk"
    disk.mkdir(exist_ok=True)
    for i in range(max(2, round(20 * share))):
        room = round(size * (1 + 1.2 * i / 20)) + 2**15
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)], capture_output=True, check=False
        )
        if mounted.returncode:
            yield "full disk", f"skipped: no tmpfs can be mounted ({mounted.stderr.decode().strip()})"
            return
        try:
            setting.models[0].save(disk / "m")
            try:
                setting.models[1].save(disk / "m")
            except OSError:
                is_new = False
            else:
                is_new = True
            whole = verify(disk / "m") == setting.digests[is_new]
            left = [file.name for file in (disk / "m").iterdir() if file.name.startswith(".")]
            yield "full disk", "whole" if whole and not left else f"left {left}, whole: {whole}"
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def wrong_calls(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Call functions and commands with wrong arguments."""
    with contextlib.chdir(setting.scratch):
        objects = setting.objects()
        yield from arguments.wrong_arguments(objects, setting.scratch, share, setting.rng)
        yield from arguments.wrong_commands(objects, setting.scratch, share, setting.rng)


def wrong_objects(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Call functions with broken objects, and with views."""
    objects = setting.objects()
    yield from broken_objects.broken_objects(objects, setting.scratch, share, setting.rng)
    yield from broken_objects.views(objects, setting.rng)


PARTS: dict[str, Callable[[Setting, float], Iterator[tuple[str, str]]]] = {
    "cards": cards,
    "kills": kills,
    "flips": flips,
    "truncations": truncations,
    "writers": writers,
    "full-disk": full_disk,
    "streams": streams,
    "files": files,
    "interrupts": interrupts,
    "trainings": trainings,
    "resume": resume,
    "arguments": wrong_calls,
    "objects": wrong_objects,
}
OUTCOMES = ("whole", "refused", "unseen", "wrong")


def print_counts(counts: dict[str, Counter[str]]) -> None:
    for what, count in counts.items():
        skipped = [kind for kind in count if kind.startswith("skipped")]
        numbers = "".join(f"{number:8}" for number in (count.total(), *(count[kind] for kind in OUTCOMES)))
        print(f"{what:46} {skipped[0] if skipped else numbers}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--smoke", action="store_true", help="a few of the cases")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments, bits and fields")
    options = parser.parse_args()
    torch.set_num_threads(1)  # processes are forked
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by default in background jobs of a shell
    mpl.use("agg")
    wrong: list[str] = []
    print(f"{'what':46} {'cases':>8}" + "".join(f"{kind:>8}" for kind in OUTCOMES))
    share = SMOKE_SHARE if options.smoke else 1.0
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(Path(scratch), np.random.default_rng(options.seed))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for part in options.only:
            counts: dict[str, Counter[str]] = {}
            for what, outcome in PARTS[part](setting, share):
                kind = outcome if outcome in OUTCOMES else "wrong"
                if outcome.startswith("skipped"):
                    kind = outcome
                elif kind == "wrong":
                    wrong.append(f"{what}: {outcome}")
                counts.setdefault(what, Counter())[kind] += 1
            print_counts(counts)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    kinds = Counter(line.split(": ")[1] for line in wrong)
    print("wrong: " + (", ".join(f"{n} {kind}" for kind, n in kinds.most_common()) or "nothing"))
    print(f"peak memory grew by {grown:.0f} MB")
    print("\n".join(wrong[:40]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
