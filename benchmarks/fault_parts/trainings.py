"""Trainings that share a directory or a process, or are continued with other inputs."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import histovar as hv

from .cases import outcome

if TYPE_CHECKING:
    from faults import Setting


def trainings(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Train twice at once, in one directory and in two threads: each result must be as alone, or refused."""
    alone = {0: _weights(setting.models[0]), 1: _weights(_train(setting, random_state=1))}
    for i in range(max(1, round(6 * share))):
        said = _in_one_directory(setting, setting.scratch / f"trained{i}", alone)
        for result in said:
            yield "trainings, one checkpoint_dir", result
        if "whole" not in said:
            yield "trainings, one checkpoint_dir", f"none is whole: {said}"
    for _ in range(max(1, round(8 * share))):
        for result in _in_threads(setting, alone):
            yield "trainings, in threads", result


def _in_one_directory(setting: Setting, directory: Path, alone: dict[int, Any]) -> list[str]:
    """Outcomes of two processes, for each of which a thread waits."""
    said: dict[int, str] = {}

    def train(seed: int) -> None:
        said[seed] = outcome(lambda: _same(_train(setting, random_state=seed, checkpoint_dir=directory), alone[seed]))

    _together(train, alone)
    return list(said.values())


def _in_threads(setting: Setting, alone: dict[int, Any]) -> list[str]:
    models: dict[int, Any] = {}

    def train(seed: int) -> None:
        models[seed] = _train(setting, random_state=seed)

    _together(train, alone)
    return [_same(models[seed], alone[seed]) if seed in models else "failed" for seed in alone]


def resume(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Continue a training with another input, option or seed than it was begun with."""
    directory = setting.scratch / "resumed"
    _train(setting, checkpoint_dir=directory)
    whole = _weights(setting.models[0])

    def panel(adata: Any) -> None:
        hv.pp.gene_panel(adata, n_genes=30, flavor="mean_std")
        genes = adata.var["histovar_panel"].to_numpy().copy()
        adata.var["histovar_panel"] = np.roll(genes, 1)

    def embeddings(adata: Any) -> None:
        adata.obsm["X_histology"] = adata.obsm["X_histology"] * 1.01

    def counts(adata: Any) -> None:
        adata.X = adata.X * 2

    changes: dict[str, tuple[Callable[[Any], None] | None, dict[str, Any]]] = {
        "nothing": (None, {}),
        "the embeddings": (embeddings, {}),
        "the counts": (counts, {}),
        "the panel": (panel, {}),
        "the seed": (None, {"random_state": 5}),
        "the batch size": (None, {"batch_size": 32}),
        "the learning rate": (None, {"learning_rate": 3e-4}),
        "the weight decay": (None, {"weight_decay": 0.1}),
        "the configuration": (None, {"config": setting.options["config"].replace(dropout=0.2)}),
    }
    chosen = list(changes) if share == 1 else ["nothing", *setting.rng.choice(list(changes)[1:], 2, replace=False)]
    for name in chosen:
        change, options = changes[str(name)]
        copy = setting.scratch / "resumed_copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory, copy)

        def case(change: Any = change, options: Any = options, copy: Any = copy) -> str:
            return _same(_train(setting, change, checkpoint_dir=copy, resume=True, **options), whole)

        said = outcome(case)
        expected = "whole" if name == "nothing" else "refused"
        yield (
            "resume, nothing changed" if name == "nothing" else "resume, changed",
            (said if said == expected else f"{name}: {said}"),
        )


def _train(setting: Setting, change: Callable[[Any], None] | None = None, **options: Any) -> hv.TwoStageVARST:
    adata = setting.training.copy()
    if change is not None:
        change(adata)
    return hv.tl.train(adata, **{"random_state": 0, **setting.options, **options}, enable_progress_bar=False)


def _weights(model: hv.TwoStageVARST) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


def _same(model: hv.TwoStageVARST, weights: dict[str, torch.Tensor]) -> str:
    differing = [name for name, values in model.state_dict().items() if not torch.equal(values, weights[name])]
    return f"other weights, such as {differing[0]}" if differing else "whole"


def _together(function: Callable[[int], None], seeds: Iterable[int]) -> None:
    threads = [threading.Thread(target=function, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
