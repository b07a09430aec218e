"""Two processes on the CPU train as one does with the same global batch."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import histovar as hv

from .conftest import small_config

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
import histovar as hv
from histovar.model import quantizer, vqvae
from histovar.training import stage1, stage2
# Quick, and processes have less time to drift apart.
stage1.WARMUP_STEPS, stage2.PRIOR_EPOCHS, vqvae.LATENTS_PER_START, quantizer.LATENTS_PER_UPDATE = 20, 4, 256, 64
devices, out = int(sys.argv[1]), sys.argv[2]
config = hv.ModelConfig.from_json(open(sys.argv[3]).read())
adata = hv.datasets.simulate(4, 48, 40, embedding_dim=16, random_state=1)
hv.pp.gene_panel(adata, n_genes=30)
hv.pp.gene_scales(adata, scales=(1, 4, 10))
model = hv.tl.train(
    adata, use_rep="X_histology", library_key="section", config=config, max_epochs=2, batch_size=16 // devices,
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", enable_progress_bar=False,
)
model.save(out)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training by one process and by two."""
    directory = tmp_path_factory.mktemp("distributed")
    # Dropout differs between processes, and is left out for them to be comparable.
    config = small_config(dropout=0.0, prior_dropout=0.0, prior_input_dropout=0.0)
    (directory / "config.json").write_text(config.to_json())
    (directory / "train.py").write_text(SCRIPT)
    # What a process was told by an outer launcher would mislead it.
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    models = []
    for devices in (1, 2):
        out = directory / f"model_{devices}"
        command = [sys.executable, "train.py", str(devices), str(out), "config.json"]
        subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True, timeout=900)
        models.append(hv.TwoStageVARST.load(out))
    return models


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_losses_are_those_of_one_process(runs, stage):
    one, two = (model.history[stage] for model in runs)
    assert len(one) == len(two)
    for column in ("train_loss", "val_loss"):
        np.testing.assert_allclose(one[column], two[column], atol=1e-3)


def test_codebooks_and_predictions_agree(runs):
    one, two = runs
    np.testing.assert_allclose(one.stage1.quantizer.codebook, two.stage1.quantizer.codebook, atol=1e-2)
    adata = hv.datasets.simulate(1, 48, 40, embedding_dim=16, random_state=2)
    first, second = (hv.tl.predict(adata, model, copy=True).obsm["histovar"] for model in runs)
    assert np.abs(first - second).mean() < 0.02 * first.std()
    known = [{**model.registry, "trust": None} for model in runs]
    assert json.dumps(known[0]) == json.dumps(known[1])
    np.testing.assert_allclose(*(hv.get.genes(model)["expected_pearson"] for model in runs), atol=0.05)
