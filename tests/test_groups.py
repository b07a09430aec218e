"""Individuals: what is held out together, what intervals rest on, and sections unlike those of training."""

import numpy as np
import pytest
import torch

import histovar as hv
from histovar.model.observation import Composition, Observation
from histovar.training.data import cross_fit_folds, held_out_spots

from .conftest import QUICK, small_config

PATIENTS = {"S1": "a", "S2": "a", "S3": "b", "S4": "c", "S5": "d", "S6": "e"}
OPTIONS = {"use_rep": "X_histology", "library_key": "section", "config": small_config(), **QUICK}


def of_patients(apart=0.8, seed=0):
    """Sections of five patients, whose genes differ by random factors."""
    adata = hv.datasets.simulate(6, 60, 40, embedding_dim=16, random_state=1)
    adata.obs["patient"] = adata.obs["section"].astype(str).map(PATIENTS)
    rng = np.random.default_rng(seed)
    counts = np.asarray(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X)
    for patient in adata.obs["patient"].unique():
        rows = (adata.obs["patient"] == patient).to_numpy()
        counts[rows] = rng.poisson(counts[rows] * np.exp(apart * rng.normal(size=adata.n_vars)))
    adata.X = counts.astype(np.float32)
    return adata


@pytest.fixture(scope="module")
def split():
    adata = of_patients()
    training = adata[adata.obs["patient"] != "e"].copy()
    hv.pp.gene_panel(training, n_genes=30)
    hv.pp.gene_scales(training, scales=(1, 4, 10))
    return training, adata[adata.obs["patient"] == "e"].copy()


@pytest.fixture(scope="module")
def by_patient(split):
    return hv.tl.train(split[0].copy(), group_key="patient", **OPTIONS)


def test_sections_of_an_individual_are_left_out_together():
    sections, place = np.repeat(["1", "2", "3", "4"], 5), np.zeros((20, 2))
    pairs = np.repeat(["a", "a", "b", "b"], 5)
    assert cross_fit_folds(sections, place, 9, pairs).tolist() == [0] * 10 + [1] * 10
    assert len(set(cross_fit_folds(sections, place, 9, np.repeat("a", 20)))) == 4  # one individual: by section
    several = np.repeat(["a", "a", "b", "c"], 5)
    for seed in range(8):
        seen, watched = held_out_spots(sections, 20, seed, several)
        assert not {*several[seen]} & {*several[watched]}


def test_the_model_knows_its_individuals(by_patient, split, tmp_path):
    by_patient.save(tmp_path / "m")
    loaded = hv.TwoStageVARST.load(tmp_path / "m")
    assert loaded.registry["group_key"] == "patient"
    assert loaded.registry["groups_stage2"] == loaded.registry["calibration"]["groups"] == ["a", "b", "c", "d"]
    query = split[1].copy()
    hv.tl.predict(query, loaded)
    assert query.uns["histovar"]["trained_on_groups"].tolist() == ["a", "b", "c", "d"]
    assert query.uns["histovar"]["params"]["group_key"] == "patient"


def test_intervals_hold_for_another_individual(by_patient, split):
    training, query = split[0], split[1].copy()
    # By section, another section of patient a was seen: it tells nothing of how far patients are apart.
    alone = training[training.obs["patient"] == "a"].copy()
    hv.tl.predict(query, by_patient, key_added="by_patient")
    hv.tl.predict(query, hv.tl.train(alone, **OPTIONS), key_added="by_section")
    covered = {}
    for key in ("by_patient", "by_section"):
        hv.tl.evaluate(query, key=key)
        covered[key] = query.uns[key]["evaluation"].loc["mean", "coverage 90 given depth"]
    assert covered["by_patient"] > 0.85
    assert covered["by_patient"] > covered["by_section"]


@pytest.mark.usefixtures("brief")
def test_what_intervals_rest_on_is_logged(split, caplog):
    caplog.set_level("INFO", logger="histovar")
    training = split[0].copy()
    hv.tl.train(training, group_key="patient", **OPTIONS)
    assert "individuals ['a', 'b', 'c', 'd']" in caplog.text
    caplog.clear()
    hv.tl.train(training, **OPTIONS)
    assert "not tested on another" in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.obs.pop("patient"), KeyError, "group_key: no 'patient' in obs"),
        (
            lambda a: a.obs.__setitem__("patient", a.obs["patient"].where(a.obs_names != a.obs_names[3])),
            ValueError,
            "group_key: 1 spots have no value",
        ),
        (lambda a: a.obs.__setitem__("patient", np.arange(a.n_obs) % 2), ValueError, "section 'S1' has several values"),
    ],
)
def test_individuals_that_cannot_be_are_refused(split, change, error, message):
    training = split[0].copy()
    change(training)
    before = set(training.uns), set(training.layers)
    with pytest.raises(error, match=message):
        hv.tl.train(training, group_key="patient", **OPTIONS)
    assert (set(training.uns), set(training.layers)) == before


def test_spread_between_groups_is_found():
    torch.manual_seed(0)
    n_groups, n, n_genes = 12, 60, 50
    groups = torch.arange(n_groups).repeat_interleave(n)
    totals = torch.full((n_groups * n,), 5000.0)
    rates = torch.full((n_groups * n, n_genes), 0.004)
    shifts = 0.5 * torch.randn(n_groups, n_genes)
    gamma = torch.distributions.Gamma(1 / 0.2, 1 / 0.2).sample(rates.shape)
    counts = torch.poisson(rates * totals[:, None] * shifts.exp()[groups] * gamma)
    depths = totals * (0.3 * torch.randn(n_groups)).exp()[groups] * (0.2 * torch.randn(len(groups))).exp()
    composition = Composition(rates, depths.log() * 0 + totals.log(), torch.zeros(len(groups)), torch.ones(len(groups)))
    observation = Observation(n_genes)
    observation.fit(counts * depths[:, None] / totals[:, None], depths, composition, groups)
    assert float(observation.apart[0]) == pytest.approx(0.5, abs=0.08)
    assert float(observation.apart[1]) == pytest.approx(0.3, abs=0.12)
    # Of spots within groups, and what is added for a new group.
    inflation = 1.729**2 / 1.645**2
    assert float(observation.dispersion.median()) == pytest.approx(0.2 + inflation * 0.25, abs=0.1)


def test_a_novel_section_is_warned_of_and_less_certain(model, query, caplog):
    hv.tl.predict(query, model, units="counts", depth=3000)
    familiar = query.copy()
    query.obsm["X_histology"] = query.obsm["X_histology"] + 6 * query.obsm["X_histology"].std(0)
    caplog.clear()
    hv.tl.predict(query, model, units="counts", depth=3000)
    assert "histology unlike that of the training sections" in caplog.text and "'S4'" in caplog.text
    now, then = (hv.get.prediction(adata).obs for adata in (query, familiar))
    assert (now["novelty"] > 0.8).all()
    for column in ("novelty", "excess", "depth_spread"):
        assert (now[column] > then[column]).all()


def uneven_groups(n_groups, n_genes, generator):
    """Counts of groups, two thirds of which are small and vary more, with their predictions."""
    small = torch.arange(n_groups) % 3 > 0
    groups = torch.arange(n_groups).repeat_interleave(torch.where(small, 20, 300))
    shape = torch.where(small, 4.0, 40.0)[groups][:, None].expand(-1, n_genes)
    totals, rates = torch.full((len(groups),), 5000.0), torch.full((len(groups), n_genes), 0.004)
    counts = torch.poisson(20 * torch._standard_gamma(shape, generator=generator) / shape, generator=generator)
    nothing = torch.zeros(len(groups))
    return counts, totals, Composition(rates, totals.log(), nothing, nothing + 1), groups


@pytest.mark.parametrize(("n_groups", "enough"), [(30, True), (6, False)])
def test_every_group_counts_the_same_where_there_are_enough(n_groups, enough):
    generator = torch.Generator().manual_seed(0)
    counts, totals, composition, groups = uneven_groups(n_groups, 20, generator)
    new, totals_new, composition_new, groups_new = uneven_groups(30, 20, generator)
    covered = {}
    for name, known in (("pooled", None), ("by group", groups)):
        observation = Observation(20)
        observation.fit(counts, totals, composition, known, generator=generator)
        ends = observation.at_levels(observation.points(composition_new, "counts", totals_new), [0.05, 0.95])
        inside = ((new >= ends[..., 0]) & (new <= ends[..., 1])).float().mean(1)
        covered[name] = float(torch.stack([inside[groups_new == k].mean() for k in range(30)]).mean())
        assert (observation.levels.diff() >= 0).all()
    assert covered["pooled"] < 0.87
    assert (0.88 < covered["by group"] < 0.94) == enough
