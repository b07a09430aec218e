"""Interrupted training loses at most an epoch, and is never mixed with another."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from copy import deepcopy

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

import histovar as hv
from histovar.training import TrainingOptions
from histovar.training.checkpoint_files import LOCK, locked, write_atomically
from histovar.training.stage2_modules import PriorModule

from .conftest import QUICK, few_steps, small_config
from .test_training import assert_same, weights

THREE = {**QUICK, "max_epochs": 3, "patience": 50}


@pytest.fixture(scope="module", autouse=True)
def brief_module(model):
    """Train with few steps in this file; the shared model is trained before."""
    with few_steps():
        yield


class Interrupt(Callback):
    """Interrupt a stage at the end of an epoch, as Ctrl-C does."""

    def __init__(self, epoch, module=""):
        self.epoch, self.module = epoch, module

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch and self.module in type(pl_module).__name__:
            raise KeyboardInterrupt


def train(adata, **options):
    return hv.tl.train(
        adata.copy(), use_rep="X_histology", library_key="section", config=small_config(), **{**THREE, **options}
    )


def stage1(adata, **options):
    return hv.tl.train_stage1(adata.copy(), library_key="section", config=small_config(), **{**THREE, **options})


@pytest.fixture(scope="module")
def whole(prepared):
    """A model trained without interruption."""
    return train(prepared)


@pytest.fixture(scope="module")
def kept(prepared, tmp_path_factory):
    """A directory with the checkpoints of stage 1, interrupted after two of three epochs; tests copy it."""
    directory = tmp_path_factory.mktemp("kept")
    with pytest.raises(KeyboardInterrupt):
        stage1(prepared, checkpoint_dir=directory, callbacks=[Interrupt(2)])
    return directory


@pytest.fixture
def interrupted(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "interrupted")


@pytest.mark.parametrize("module", ["Stage1Module", "Stage2Module"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_both_stages_resume_by_the_same_call(prepared, whole, tmp_path, module, epoch):
    with pytest.raises(KeyboardInterrupt):
        train(prepared, checkpoint_dir=tmp_path, callbacks=[Interrupt(epoch, module)])
    epochs = []

    class Count(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            epochs.append((type(pl_module).__name__, trainer.current_epoch))

    resumed = train(prepared, checkpoint_dir=tmp_path, resume=True, callbacks=[Count()])
    assert_same(weights(whole), weights(resumed))
    assert resumed.registry == whole.registry
    for stage in ("stage1", "stage2"):
        assert resumed.history[stage].equals(whole.history[stage])
    assert [e for m, e in epochs if m == module] == list(range(epoch, 3))
    assert (("Stage1Module", 0) in epochs) == (module == "Stage1Module" and epoch == 0)
    assert sorted(p.name for p in tmp_path.rglob("*.ckpt")) == sorted(2 * ["best.ckpt", "last.ckpt", "start.ckpt"])
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(LOCK))


def test_prior_resumes(prepared, whole, tmp_path, monkeypatch):
    epochs = []

    def interrupt(self):
        epochs.append(self.current_epoch)
        if epochs == [0, 1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(PriorModule, "on_train_epoch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(prepared, checkpoint_dir=tmp_path)
    assert (tmp_path / "stage2" / "prior.ckpt").is_file()
    resumed = train(prepared, checkpoint_dir=tmp_path, resume=True)
    assert epochs == [0, 1, 2, 2, 3]
    assert_same(weights(whole), weights(resumed))
    assert not (tmp_path / "stage2" / "prior.ckpt").exists()


def test_finished_training_is_not_repeated(prepared, whole, tmp_path):
    train(prepared, checkpoint_dir=tmp_path, resume=True)  # where nothing was kept, training begins
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.ckpt")}
    again = train(prepared, checkpoint_dir=tmp_path, resume=True)
    assert_same(weights(whole), weights(again))
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.ckpt")}
    longer = train(prepared, checkpoint_dir=tmp_path, resume=True, max_epochs=4)
    assert [len(longer.history[s]) for s in ("stage1", "stage2")] == [3, 4]  # stage 2 is of this stage 1
    with pytest.raises(ValueError, match="has checkpoints .* would be overwritten"):
        train(prepared, checkpoint_dir=tmp_path)


def test_last_checkpoint_is_of_the_last_epoch_though_it_was_not_the_best(prepared, tmp_path):
    class Worse(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.callback_metrics["val_loss"] = torch.tensor(float(trainer.current_epoch))

    stage1(prepared, checkpoint_dir=tmp_path, callbacks=[Worse()])
    best, last = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("best", "last"))
    assert best["epoch"] == 0 and last["epoch"] == 2
    assert last["callbacks"]["StageCheckpoint"]["best_score"] == 0


def test_stage_that_stopped_early_is_finished(prepared, tmp_path):
    class Worse(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.callback_metrics["val_loss"] = torch.tensor(float(trainer.current_epoch))

    options = {"checkpoint_dir": tmp_path, "patience": 1, "max_epochs": 9}
    first = stage1(prepared, callbacks=[Worse()], **options)
    again = stage1(prepared, resume_from=tmp_path, **options)
    assert len(first.history["stage1"]) == len(again.history["stage1"]) == 2
    assert_same(weights(first), weights(again))


def test_checkpoints_may_move(prepared, whole, interrupted, tmp_path):
    moved = interrupted.rename(tmp_path / "moved")
    resumed = stage1(prepared, resume_from=moved)
    assert_same(weights(whole.stage1), weights(resumed.stage1))
    resumed = stage1(prepared, resume_from=moved / "last.ckpt", checkpoint_dir=tmp_path / "other")
    assert_same(weights(whole.stage1), weights(resumed.stage1))
    assert torch.load(moved / "last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 32}, r"batch_size \(was 64, now 32\)"),
        ({"learning_rate": 2e-4}, r"learning_rate \(was 0.0001, now 0.0002\)"),
        ({"random_state": 1}, r"random_state \(was 0, now 1\)"),
        ({"config": small_config(codebook_decay=0.9)}, r"codebook_decay \(was 0.95, now 0.9\)"),
        ({"max_epochs": 1}, "max_epochs: got 1, but .* already has 2"),
    ],
)
def test_other_options_are_refused(prepared, interrupted, changes, message):
    arguments = {"config": small_config(), "library_key": "section", **THREE, **changes}
    with pytest.raises(ValueError, match=message):
        hv.tl.train_stage1(prepared.copy(), resume_from=interrupted, checkpoint_dir=interrupted, **arguments)


def test_other_data_are_refused(prepared, model, interrupted, tmp_path):
    other = prepared.copy()
    other.X = other.X.copy()
    other.X[0, np.flatnonzero(other.var["histovar_panel"])[0]] += 1
    other.layers.pop("lognorm", None)
    with pytest.raises(ValueError, match="a different training run, which differs in expression"):
        stage1(other, resume_from=interrupted)
    renamed = prepared.copy()
    renamed.var_names = [f"{name}x" for name in renamed.var_names]
    with pytest.raises(ValueError, match="differs in gene panel"):
        stage1(renamed, resume_from=interrupted)

    def stage2(adata, of_stage1=model, **options):
        trained = deepcopy(of_stage1)
        return hv.tl.train_stage2(
            adata.copy(), trained, use_rep="X_histology", library_key="section", **{**THREE, **options}
        )

    with pytest.raises(KeyboardInterrupt):
        stage2(prepared, checkpoint_dir=tmp_path, callbacks=[Interrupt(1)])
    other = prepared.copy()
    other.obsm["X_histology"] = other.obsm["X_histology"] + np.eye(*other.obsm["X_histology"].shape, dtype=np.float32)
    with pytest.raises(ValueError, match="differs in embeddings"):
        stage2(other, resume_from=tmp_path)
    other_stage1 = deepcopy(model)
    other_stage1.stage1.quantizer.codebook.mul_(1.01)
    with pytest.raises(ValueError, match="stage 1"):
        stage2(prepared, other_stage1, resume_from=tmp_path)
    with pytest.raises(ValueError, match=r"stage \(was 1, now 2\)"):
        stage2(prepared, resume_from=interrupted)


def test_damaged_checkpoints_are_refused(prepared, interrupted):
    last = interrupted / "last.ckpt"
    content = last.read_bytes()
    last.unlink()  # it may be the same file as best.ckpt
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
        stage1(prepared, resume_from=interrupted)
    torch.save({"epoch": 3, "state_dict": {}}, last)
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        stage1(prepared, resume_from=last)


def test_files_are_whole_or_not_there(tmp_path):
    file = tmp_path / "last.ckpt"
    file.write_text("old")

    def fail(beside):
        beside.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(file, fail)
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX's")
def test_full_disk_leaves_the_checkpoints_before(prepared, whole, tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FullDisk(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.raises(OSError, match="checkpoint_dir: .* cannot be written"):
            stage1(prepared, checkpoint_dir=tmp_path, callbacks=[FullDisk()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt", "start.ckpt"]
    (tmp_path / ".last.ckpt.0123.part").touch()  # as kill -9 would leave it
    resumed = stage1(prepared, checkpoint_dir=tmp_path, resume_from=tmp_path)
    assert_same(weights(whole.stage1), weights(resumed.stage1))
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt", "start.ckpt"]


def test_a_directory_belongs_to_one_training(prepared, interrupted, tmp_path):
    with pytest.raises(ValueError, match="would be overwritten"):
        stage1(prepared, checkpoint_dir=interrupted)
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock = tmp_path / LOCK
    with locked(tmp_path):
        owner = json.loads(lock.read_text())
        with pytest.raises(ValueError, match=f"another training run .process {os.getpid()}"):
            stage1(prepared, checkpoint_dir=tmp_path)
    stat = f"/proc/{running.pid}/stat"
    if os.path.exists(stat):
        owner["started"] = open(stat).read().rpartition(")")[2].split()[19]
    lock.write_text(json.dumps({**owner, "pid": running.pid}))
    with pytest.raises(ValueError, match=f"another training run .process {running.pid}"):
        train(prepared, checkpoint_dir=tmp_path)
    running.kill()
    running.wait()
    with locked(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()
    lock.write_text(json.dumps({**owner, "host": "elsewhere"}))
    with pytest.raises(ValueError, match="on elsewhere"):
        stage1(prepared, checkpoint_dir=tmp_path)
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="checkpoint_dir"):
            stage1(prepared, checkpoint_dir=wrong)


def test_a_model_is_as_it_was_when_training_stage_2_ends_early(prepared, loaded):
    before, registry, config, history = weights(loaded), deepcopy(loaded.registry), loaded.config, loaded.history

    def retrain(**options):
        config = small_config(n_layers=1)
        hv.tl.train_stage2(
            prepared.copy(), loaded, use_rep="X_histology", library_key="section", config=config, **{**THREE, **options}
        )

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        retrain(callbacks=[Interrupt(1)])
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(FloatingPointError):
        retrain(learning_rate=1e20)
    assert_same(before, weights(loaded))
    assert loaded.registry == registry and loaded.config is config and loaded.history is history
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    retrain()
    assert loaded.config.n_layers == loaded.stage1.config.n_layers == 1 and "calibration" not in loaded.registry


@pytest.mark.parametrize("learning_rate", [10, 1e3, 1e20])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_diverged_training_says_so_or_predicts_numbers(prepared, stage, learning_rate):
    try:
        model = train(prepared, **{stage: {"learning_rate": learning_rate}})
    except FloatingPointError as error:
        assert "training diverged" in str(error) and "lower learning_rate" in str(error)
    else:
        assert learning_rate < 1e20
        predicted = hv.tl.predict(prepared, model, copy=True).obsm
        slots = [name for name in predicted if name.startswith("histovar")]
        assert "histovar" in slots and all(np.isfinite(predicted[name]).all() for name in slots)


def test_threads_train_as_if_alone(prepared, whole):
    levels = {n: logging.getLogger(n).level for n in ("lightning.pytorch", "lightning.fabric")}
    models = {}

    def run(number):
        models[number] = stage1(prepared)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    torch.set_default_dtype(torch.float64)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for number in range(2):
        assert_same(weights(whole.stage1), weights(models[number].stage1))
    assert levels == {n: logging.getLogger(n).level for n in levels}


def test_an_interrupted_thread_raises_keyboard_interrupt(prepared):
    errors = []

    def run():
        try:
            stage1(prepared, callbacks=[Interrupt(0)])
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [type(error) for error in errors] == [KeyboardInterrupt]


def test_numpy_scalars_are_options():
    options = TrainingOptions(
        max_epochs=np.int64(2),
        batch_size=np.uint8(16),
        learning_rate=np.float64(1e-3),
        weight_decay=np.float32(0),
        random_state=np.int32(3),
        devices=np.int64(1),
        enable_progress_bar=np.bool_(False),
    )
    names = ("max_epochs", "batch_size", "learning_rate", "weight_decay", "random_state", "devices")
    assert [type(getattr(options, name)) for name in names] == [int, int, float, float, int, int]
    assert options.enable_progress_bar is False and options.world_size == 1


def test_numpy_scalars_train(prepared):
    stage1(prepared, max_epochs=np.int64(1), learning_rate=np.float64(1e-4), batch_size=np.int64(64))
    assert stage1(prepared, random_state=np.int64(0), max_epochs=1).history["stage1"].shape[0] == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 1.5}, ValueError, "batch_size: expected a whole number, got 1.5"),
        ({"batch_size": True}, TypeError, "batch_size: expected a whole number, got True"),
        ({"batch_size": "64"}, TypeError, "batch_size: expected a whole number, got '64'"),
        ({"batch_size": None}, TypeError, "batch_size: expected a whole number, got None"),
        ({"max_epochs": float("nan")}, ValueError, "max_epochs: expected a whole number, got nan"),
        ({"patience": float("inf")}, ValueError, "patience: expected a whole number, got inf"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: expected at least 0, got -1"),
        ({"random_state": -1}, ValueError, "random_state: expected at least 0, got -1"),
        ({"random_state": 2**32}, ValueError, "random_state: expected at most 4294967295, got"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate: expected a finite number, got nan"),
        ({"learning_rate": "0.001"}, TypeError, "learning_rate: expected a number, got '0.001'"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: expected at least 0, got -0.1"),
        ({"gradient_clip_val": False}, TypeError, "gradient_clip_val: expected a number, got False"),
        ({"enable_progress_bar": "no"}, TypeError, "enable_progress_bar: expected True or False, got 'no'"),
        ({"devices": 0}, ValueError, "devices: expected at least 1 .* got 0"),
        ({"devices": []}, ValueError, "devices: expected at least one device"),
        ({"num_nodes": 0}, ValueError, "num_nodes: expected at least 1, got 0"),
        ({"accelerator": "abacus"}, ValueError, "accelerator='abacus'"),
        ({"accelerator": None}, TypeError, "accelerator: expected text, got None"),
        ({"strategy": "none such"}, ValueError, "strategy='none such'"),
        ({"precision": "3-bit"}, ValueError, "precision='3-bit'"),
        ({"logger": "csv"}, TypeError, "logger: expected True, False or Lightning loggers, got 'csv'"),
        ({"callbacks": [print]}, TypeError, "callbacks: expected a list of Lightning callbacks"),
        ({"checkpoint_dir": ""}, ValueError, "checkpoint_dir: expected a path that is not empty"),
        ({"checkpoint_dir": 3}, TypeError, "checkpoint_dir: expected a path or None, got 3"),
        ({"resume_from": "nowhere"}, (FileNotFoundError, ValueError), "resume_from"),
        ({"epochs": 3}, TypeError, r"unknown training options \['epochs'\]; the options are \['max_epochs'"),
        ({"resume": True}, (TypeError, ValueError), "resume"),
    ],
)
def test_wrong_options_are_refused_before_any_work(training, loaded, options, error, message):
    before = set(training.var), set(training.layers), set(training.uns)
    calls = [
        lambda: hv.tl.train_stage1(training, **options),
        lambda: hv.tl.train_stage2(training, loaded, use_rep="X_histology", **options),
        lambda: hv.tl.train(training, use_rep="X_histology", **options),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()
    assert before == (set(training.var), set(training.layers), set(training.uns))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stage2": {"batch_size": 0}}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"stage1": {"steps": 2}}, TypeError, "unknown training options"),
        ({"stage1": [1]}, TypeError, "stage1: expected a dict"),
        ({"stage2": {"random_state": 1}}, ValueError, "stage2: .* apply to both stages"),
        ({"checkpoint_dir": "d", "resume": "yes"}, TypeError, "resume: expected True or False, got 'yes'"),
    ],
)
def test_wrong_options_of_a_stage_are_refused_before_any_work(training, options, error, message):
    with pytest.raises(error, match=message):
        hv.tl.train(training, use_rep="X_histology", **options)
    assert "histovar_panel" not in training.var
