"""Small data and one small trained model, shared by all tests."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import pytest
import torch

import histovar as hv
from histovar import _torchvision  # noqa: F401  # before tests that import lightning, which imports torchvision
from histovar.cli import main

matplotlib.use("agg")
torch.set_num_threads(1)  # small models gain little from more

QUICK = {"enable_progress_bar": False, "max_epochs": 2}


def pytest_collection_finish():
    gc.freeze()  # what was imported is no garbage, and need not be gone through again and again


@pytest.fixture(scope="session")
def simulated():
    return hv.datasets.simulate(4, 60, 40, embedding_dim=16, random_state=1)


@pytest.fixture
def training(simulated):
    return simulated[simulated.obs["section"] != "S4"].copy()


@pytest.fixture
def query(simulated):
    return simulated[simulated.obs["section"] == "S4"].copy()


def small_config(n_genes=30, **changes):
    values = {
        "scales": (1, 4, 10, n_genes),
        "components": (2, 1, 1, 1),
        "encoder_hidden": (16, 16, 16, 16),
        "codebook_size": 128,
        "codebook_dim": 16,
        "n_neighbors": (4, 8),
        "n_pcs": 8,
        "width": 32,
        "n_heads": 4,
        "feedforward": 64,
        "n_members": 3,
        "prior_hidden": 32,
    }
    return hv.ModelConfig.default(n_genes, **{**values, **changes})


@pytest.fixture(scope="session")
def prepared(simulated):
    adata = simulated[simulated.obs["section"] != "S4"].copy()
    hv.pp.gene_panel(adata, n_genes=30)
    hv.pp.gene_scales(adata, scales=(1, 4, 10))
    return adata


@pytest.fixture(scope="session")
def model(prepared):
    """A trained model; tests must not change it."""
    return hv.tl.train(prepared.copy(), use_rep="X_histology", library_key="section", config=small_config(), **QUICK)


@pytest.fixture(scope="session")
def model_of_values(prepared):
    """A model trained on a layer of values instead of counts; tests must not change it."""
    adata = prepared.copy()
    adata.layers["values"] = adata.layers["lognorm"]
    options = {"use_rep": "X_histology", "library_key": "section", "config": small_config()}
    return hv.tl.train(adata, layer="values", **options, **QUICK)


@contextmanager
def few_steps() -> Iterator[None]:
    """Cut the steps and latents of training, for tests that do not look at what is learnt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histovar.model.vqvae.LATENTS_PER_START", 256)
        patch.setattr("histovar.model.quantizer.LATENTS_PER_UPDATE", 64)
        patch.setattr("histovar.training.stage1.WARMUP_STEPS", 20)
        patch.setattr("histovar.training.stage2.PRIOR_EPOCHS", 4)
        yield


@pytest.fixture
def brief():
    """Train with few steps in this test; the shared models are trained with all of them."""
    with few_steps():
        yield


@pytest.fixture
def loaded_of_values(model_of_values, tmp_path):
    """A copy of the model of values that tests may change."""
    model_of_values.save(tmp_path / "of_values")
    return hv.TwoStageVARST.load(tmp_path / "of_values")


@pytest.fixture
def loaded(model, tmp_path):
    """A copy of the trained model that tests may change."""
    model.save(tmp_path / "copy")
    return hv.TwoStageVARST.load(tmp_path / "copy")


@pytest.fixture
def histovar(tmp_path, monkeypatch, capsys):
    """Run a command in this process, in `tmp_path`; returns exit code, standard output and standard error."""
    package = logging.getLogger("histovar")
    monkeypatch.setattr(package, "level", package.level)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(package, "handlers", [])
        monkeypatch.setattr(sys, "argv", ["histovar", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def data_dir():
    directory = os.environ.get("HISTOVAR_DATA")
    if not directory:
        pytest.skip("HISTOVAR_DATA is not set: it names the directory with the real data")
    path = Path(directory)
    if not (path / "her2st" / "paired.h5ad").is_file():
        pytest.skip(f"HISTOVAR_DATA: {path} does not hold her2st/paired.h5ad")
    return path
