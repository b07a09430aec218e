"""Results on a GPU equal those on the CPU; ``benchmarks/device.py`` compares more, and measures speed."""

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import histovar as hv
from histovar.training.callbacks import WeightAverage

from .conftest import QUICK, small_config

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device"),
]
SAME = 1e-3  # of a gene's standard deviation


@pytest.fixture
def open_gate(loaded):
    """The model with its gate open: were it shut, expected values would be the prior's alone."""
    loaded.stage2.head.gate.fill_(1)
    return loaded


def apart(one, other, model):
    """Differences of two mean predictions, in standard deviations of the genes."""
    values = [hv.get.prediction(adata).X for adata in (one, other)]
    return np.abs(values[0] - values[1]) / model.stage1.scales.std.cpu().numpy()


def test_tokens_are_the_same(open_gate, query):
    for verb, options in ((hv.tl.tokenize, {}), (hv.tl.predict, {"decoding": "greedy"})):
        made = [verb(query, open_gate, device=d, copy=True, **options).obsm["histovar_tokens"] for d in ("cpu", "cuda")]
        assert (made[0] != made[1]).mean() < 0.01


def test_expected_values_are_the_same(open_gate, query):
    made = [hv.tl.predict(query, open_gate, device=device, copy=True) for device in ("cpu", "cuda")]
    assert apart(made[0], made[1], open_gate).max() < SAME


def test_draws_repeat(open_gate, query):
    made = [hv.tl.predict(query, open_gate, device="cuda", n_samples=3, random_state=5, copy=True) for _ in range(2)]
    np.testing.assert_array_equal(*(adata.obsm["histovar_samples"] for adata in made))


def test_calibration_is_the_same(model, query, tmp_path):
    model.save(tmp_path)
    found = []
    for device in ("cpu", "cuda"):
        one = hv.TwoStageVARST.load(tmp_path)
        hv.tl.calibrate(query, one, library_key="section", device=device)
        found.append(one.stage2.observation)
    torch.testing.assert_close(found[0].dispersion, found[1].dispersion, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(found[0].depth_errors, found[1].depth_errors, rtol=0.01, atol=1e-3)


def test_models_move(open_gate, query, tmp_path):
    before = hv.tl.predict(query, open_gate, device="cpu", copy=True)
    open_gate.to("cuda").save(tmp_path / "from_cuda")
    there = hv.tl.predict(query, open_gate, copy=True)
    assert open_gate.device.type == "cuda"
    loaded = hv.TwoStageVARST.load(tmp_path / "from_cuda")
    assert loaded.device.type == "cpu"
    back = hv.tl.predict(query, loaded, device="cpu", copy=True)
    assert apart(before, there, loaded).max() < SAME and apart(before, back, loaded).max() == 0


class Watch(Callback):
    """Check where weights are averaged; raise an error if the host waits for the device after the first step."""

    def __init__(self):
        self.devices = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAverage):
                self.devices |= {p.device.type for p in callback._average_model.parameters()}
        torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")

    def on_after_backward(self, trainer, pl_module):
        torch.cuda.set_sync_debug_mode("default")  # the average's counter is on the device


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_converges_without_waiting(prepared, query, model, precision):
    watch = Watch()
    options = {"use_rep": "X_histology", "library_key": "section", "config": small_config(), **QUICK}
    of_stage2 = {"callbacks": [watch]}
    trained = hv.tl.train(prepared.copy(), accelerator="cuda", precision=precision, stage2=of_stage2, **options)
    torch.cuda.set_sync_debug_mode("default")
    assert watch.devices == {"cuda"}
    scores = []
    for one in (model, trained):
        hv.tl.predict(query, one)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores.append(hv.tl.evaluate(query)["pearson"].mean())
    assert scores[1] > scores[0] - 0.05


def test_a_model_on_a_device_is_trained_on(loaded, prepared):
    options = {"use_rep": "X_histology", "library_key": "section", **QUICK}
    trained = hv.tl.train_stage2(prepared.copy(), loaded.to("cuda"), accelerator="cuda", **options)
    assert np.isfinite(trained.history["stage2"]["val_loss"]).all()
