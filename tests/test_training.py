import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

import histovar as hv
from histovar.anndata_io import zarr_store
from histovar.training import TrainingOptions
from histovar.training.data import cross_fit_folds, held_out_spots

from .conftest import QUICK, small_config


def weights(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_same_seed_same_model(prepared, model):
    again = hv.tl.train(prepared.copy(), use_rep="X_histology", library_key="section", config=small_config(), **QUICK)
    assert_same(weights(model), weights(again))
    other = hv.tl.train_stage1(prepared.copy(), config=small_config(), random_state=1, **QUICK)
    assert not torch.equal(model.stage1.quantizer.codebook, other.stage1.quantizer.codebook)


def test_epochs_are_cut_short_by_steps():
    assert TrainingOptions(batch_size=10).epochs(1000, 50) == 1
    short = TrainingOptions(batch_size=10, limit_train_batches=5)
    assert short.epochs(1000, 50) == 10 and short.epochs(30, 50) == 17
    with pytest.raises(ValueError, match="limit_train_batches: expected at least 1, got 0"):
        TrainingOptions(limit_train_batches=0)


@pytest.mark.usefixtures("brief")
def test_an_epoch_has_no_more_batches_than_asked_for(prepared):
    class Steps(Callback):
        n = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.n += 1

    steps = Steps()
    options = {"batch_size": 16, "limit_train_batches": 3, "max_epochs": 2, "callbacks": [steps]}
    hv.tl.train_stage1(prepared.copy(), config=small_config(), enable_progress_bar=False, **options)
    assert steps.n == 6


@pytest.mark.usefixtures("brief")
def test_progress_bars_name_the_step(prepared, capsys):
    options = {"library_key": "section", "max_epochs": 1, "limit_train_batches": 1}
    hv.tl.train(prepared.copy(), use_rep="X_histology", config=small_config(), **options)
    written = capsys.readouterr().err
    steps = ("stage 1: warm-up", "stage 1: codebook", "stage 2: prior", "stage 2: tokens")
    assert all(f"{step}, epoch " in written for step in steps)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("stored", [False, True])
def test_training_warns_once(prepared, tmp_path, caplog, stored):
    adata = prepared.copy()
    if stored:  # read section by section
        adata.write_zarr(tmp_path / "in.zarr")
        adata = zarr_store.read_zarr(tmp_path / "in.zarr")
    caplog.set_level("WARNING", logger="histovar")
    config = small_config(n_neighbors=(4, 20))  # of 60 spots a quarter is 15
    hv.tl.train(adata, use_rep="X_histology", library_key="section", config=config, **QUICK)
    cut = [message for message in caplog.messages if "are cut to" in message]
    sections = ", ".join(f"15 in section 'S{i}' of 60 spots" for i in (1, 2, 3))
    assert cut == [f"neighbourhoods of 20 are cut to {sections}"]


@pytest.mark.usefixtures("brief")
def test_every_call_warns_once_of_slides_that_lie_on_each_other(prepared, caplog):
    slides = prepared.copy()
    del slides.uns["spatial"]
    slides.obsm["spatial"] = np.tile(slides.obsm["spatial"][:60], (3, 1))
    for _ in range(2):
        caplog.clear()
        hv.tl.train(slides, use_rep="X_histology", config=small_config(), **QUICK)
        assert sum("have the same coordinates as another spot" in message for message in caplog.messages) == 1


@pytest.mark.usefixtures("brief")
def test_training_leaves_the_global_random_state(prepared):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    hv.tl.train_stage1(prepared.copy(), config=small_config(), **QUICK)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.usefixtures("brief")
def test_training_one_stage_leaves_the_other(prepared, loaded):
    before = weights(loaded.stage1)
    hv.tl.train_stage2(prepared.copy(), loaded, use_rep="X_histology", library_key="section", **QUICK)
    assert_same(before, weights(loaded.stage1))
    assert not any(p.requires_grad for p in loaded.parameters())


class Interrupt(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise RuntimeError("power cut")


LONG = {**QUICK, "max_epochs": 5, "patience": 50}


@pytest.mark.usefixtures("brief")
def test_stage1_resumes_to_the_same_result(prepared, tmp_path):
    def train(**options):
        return hv.tl.train_stage1(prepared.copy(), library_key="section", config=small_config(), **LONG, **options)

    whole = train()
    with pytest.raises(RuntimeError, match="power cut"):
        train(callbacks=[Interrupt()], checkpoint_dir=tmp_path)
    resumed = train(resume_from=tmp_path / "last.ckpt", checkpoint_dir=tmp_path)
    assert_same(weights(whole), weights(resumed))
    np.testing.assert_array_equal(whole.history["stage1"], resumed.history["stage1"])


@pytest.mark.usefixtures("brief")
def test_stage2_resumes_to_the_same_result(prepared, model, tmp_path):
    model.save(tmp_path / "model")

    def train(**options):
        fresh = hv.TwoStageVARST.load(tmp_path / "model")
        return hv.tl.train_stage2(
            prepared.copy(), fresh, use_rep="X_histology", library_key="section", **LONG, **options
        )

    whole = train()
    with pytest.raises(RuntimeError, match="power cut"):
        train(callbacks=[Interrupt()], checkpoint_dir=tmp_path)
    resumed = train(resume_from=tmp_path / "last.ckpt", checkpoint_dir=tmp_path)
    assert_same(weights(whole), weights(resumed))


def test_history_holds_what_is_watched(model):
    stage1, stage2 = model.history["stage1"], model.history["stage2"]
    for part in ("train", "val"):
        assert {f"{part}_{n}" for n in ("loss", "reconstruction", "hierarchical", "vq")} <= set(stage1)
    assert {"val_usage", "val_perplexity", "val_usage_scale0", "val_perplexity_scale3"} <= set(stage1)
    assert {"train_loss", "val_loss", "val_accuracy", "val_top5_accuracy", "val_perplexity", "val_pcc"} <= set(stage2)
    assert len(stage1) == len(stage2) == 2


@pytest.mark.usefixtures("brief")
def test_stage2_learns(prepared, loaded):
    hv.tl.train_stage2(
        prepared.copy(), loaded, use_rep="X_histology", library_key="section", **{**QUICK, "max_epochs": 8}
    )
    losses = loaded.history["stage2"]["train_loss"]
    assert losses.iloc[-1] < losses.iloc[0]


def test_held_out_spots():
    sections = np.repeat(["a", "b", "c"], 20)
    seen, watched = held_out_spots(sections, 60, 0)
    assert len(set(sections[watched])) == 1 and len(watched) == 20 and len(seen) == 40
    assert not set(sections[watched]) & set(sections[seen])
    for one in (np.repeat("a", 60), None):
        seen, watched = held_out_spots(one, 60, 0)
        assert len(watched) == 6 and sorted([*seen, *watched]) == list(range(60))
    seen, watched = held_out_spots(np.repeat(["a", "b"], 1000), 2000, 0)
    assert len(seen) == 1000 and len(watched) == 256


def test_folds_do_not_tear_neighbours_apart():
    sections = np.repeat(["a", "b", "c"], 20)
    place = np.random.default_rng(0).uniform(size=(60, 2)) * [10, 1]
    folds = cross_fit_folds(sections, place, 9)
    assert all(len(set(folds[sections == s])) == 1 for s in "abc") and len(set(folds)) == 3
    strips = cross_fit_folds(None, place, 9)
    assert sorted(set(strips)) == [0, 1, 2, 3]
    assert max(place[strips == 0, 0]) < min(place[strips == 3, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"learning_rate": 0}, "learning_rate: expected more than 0, got 0"),
        ({"averaging_decay": 1}, "averaging_decay"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**options)


def test_missing_checkpoint_is_refused_before_any_work(training):
    before = training.copy()
    with pytest.raises(FileNotFoundError, match="resume_from"):
        hv.tl.train_stage1(training, resume_from="nowhere.ckpt", **QUICK)
    assert list(training.var.columns) == list(before.var.columns) and not training.layers


def test_auto_accelerator_never_picks_mps():
    assert TrainingOptions().resolved_accelerator() in ("cpu", "cuda")


def test_a_strategy_may_be_an_object():
    """A strategy of Lightning serves one trainer, and a training has several."""
    options = TrainingOptions(accelerator="cpu", strategy=DDPStrategy(process_group_backend="gloo"))
    first, second = options.trainer(), options.trainer()
    assert first.strategy is not second.strategy
    assert options.world_size == first.world_size == second.world_size == 1


@pytest.mark.usefixtures("brief")
def test_reference_configuration_trains_a_step_and_predicts(simulated):
    adata = hv.datasets.simulate(2, 30, 40, embedding_dim=16)
    hv.pp.gene_panel(adata, n_genes=40, min_fraction=0)
    config = hv.ModelConfig.reference(
        n_genes=40, scales=(1, 8, 20, 40), embedding_dims=(16,), n_layers=2, codebook_size=64
    )
    hv.pp.gene_scales(adata, scales=(1, 8, 20))
    model = hv.tl.train(adata, use_rep="X_histology", library_key="section", config=config, **QUICK)
    before = model.stage1.quantizer.codebook.clone()
    out = hv.tl.predict(adata[:4], model, copy=True)
    assert np.isfinite(out.layers["histovar"]).all() and out.layers["histovar"].shape == (4, 40)
    assert torch.equal(before, model.stage1.quantizer.codebook)


def test_mixed_precision_trains_on_the_cpu(prepared, brief):
    model = hv.tl.train(
        prepared.copy(), use_rep="X_histology", library_key="section", config=small_config(), precision="bf16-mixed",
        enable_progress_bar=False, max_epochs=1,
    )  # fmt: skip
    assert np.isfinite(model.history["stage2"]["train_loss"]).all()
