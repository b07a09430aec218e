"""NaN, infinite and too large values, in the input and in predictions."""

import dask.array as da
import numpy as np
import pytest
import torch

import histovar as hv

from .conftest import QUICK
from .test_errors import refuse

KEY = "X_histology"


@pytest.mark.parametrize("value", [1e25, -1e16])
@pytest.mark.parametrize("lazy", [False, True])
def test_embeddings_too_large_to_square_are_refused(query, model, prepared, value, lazy):
    message = rf"use_rep: obsm\['{KEY}'\].* has values of up to 1e\+(25|16) in 1 rows, first at row 4; drop those spots"
    query.obsm[KEY][4, 2] = value
    if lazy:
        query.obsm[KEY] = da.from_array(query.obsm[KEY], chunks=(30, 16))
        hv.tl.predict(query, model)
        with pytest.raises(ValueError, match=message):
            query.obsm["histovar"].compute()
        return
    refuse(query, lambda a: hv.tl.predict(a, model), ValueError, message)
    refuse(query, lambda a: hv.pp.niche(a, use_rep=KEY), ValueError, message)
    training = prepared.copy()
    training.obsm[KEY][4, 2] = value
    refuse(training, lambda a: hv.tl.train(a, use_rep=KEY, library_key="section", **QUICK), ValueError, message)


@pytest.mark.parametrize("value", [1e2, 1e6, 1e10, 1e14])
def test_large_embeddings_are_predicted_or_refused(query, model, value):
    query.obsm[KEY][4, 2] = value
    try:
        hv.tl.predict(query, model)
    except ValueError as error:
        assert "prediction: not finite in" in str(error)
    else:
        assert np.isfinite(query.obsm["histovar"]).all() and np.isfinite(query.obsm["histovar_std"]).all()


@pytest.mark.parametrize("value", [np.nan, 1e25])
def test_niches_that_are_not_finite_are_refused(query, model, value):
    columns = {"use_rep": KEY, "n_neighbors": (4, 8), "library_key": "section"}
    hv.pp.niche(query, **columns)
    query.obsm["histovar_niche"][7, 3] = value
    with pytest.raises(
        ValueError, match=r"obsm\['histovar_niche'\] has .* in 1 rows, first at row 7; call histovar.pp.ni"
    ):
        hv.tl.predict(query, model)
    assert "histovar" not in query.obsm


@pytest.mark.parametrize("lazy", [False, True])
def test_predictions_that_are_not_finite_are_refused(query, loaded, lazy):
    with torch.no_grad():
        loaded.stage1.scales.mean[3] = torch.nan
    message = r"prediction: not finite in (60|30) of (60|30) spots, first at row (0|30); .* the model's weights"
    if lazy:
        query.obsm[KEY] = da.from_array(query.obsm[KEY], chunks=(30, 16))
        hv.tl.predict(query, loaded)
        with pytest.raises(ValueError, match=message):
            query.obsm["histovar"].compute()
    else:
        refuse(query, lambda a: hv.tl.predict(a, loaded), ValueError, message)


@pytest.mark.usefixtures("brief")
def test_covariates_far_from_training_are_named(query, prepared):
    from .conftest import small_config

    training = prepared.copy()
    training.obs["age"] = np.arange(training.n_obs) % 7.0
    model = hv.tl.train(
        training, use_rep=KEY, library_key="section", covariates=["age"], config=small_config(n_covariates=1), **QUICK
    )
    query.obs["age"] = 3.0
    query.obs.iloc[5, query.obs.columns.get_loc("age")] = 1e30
    with pytest.raises(
        ValueError, match=r"not finite in 1 of 60 spots, first at row 5; .* covariates reach [\d.e+]+, "
    ):
        hv.tl.predict(query, model)
