"""Predict expression with uncertainty, tokens and draws for spots in memory; for all spots or a chunk of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from histovar._memory import keep_freed_memory
from histovar._progress import progress
from histovar.anndata_io.prediction import Prediction
from histovar.model import Decoding, Histology, TwoStageVARST
from histovar.model.network import Precision
from histovar.model.observation import RATE_TOTAL, Units
from histovar.model.precision import full_precision

from .device import on_device

# Standardised inputs larger than this are errors: a few tens are usual.
FAR = 1e4


@dataclass(frozen=True)
class Predictor:
    """Predicts mean, standard deviation, tokens, draws and quantiles, by the options of :func:`histovar.tl.predict`.

    Parameters
    ----------
    decoding
        How tokens are chosen for the mean.
    sampling
        How tokens are drawn for the draws.
    units, n_samples, quantiles, tokens, batch_size, device, precision
        As in :func:`histovar.tl.predict`.
    """

    decoding: Decoding
    sampling: Decoding
    units: Units
    n_samples: int
    quantiles: tuple[float, ...]
    tokens: bool
    batch_size: int
    device: str
    precision: Precision

    def is_calibrated(self, model: TwoStageVARST) -> bool:
        """Whether the prediction is calibrated."""
        return self.decoding.mode == "expected" and model.var_stage.is_calibrated

    def is_of_counts(self, model: TwoStageVARST) -> bool:
        """Whether the prediction comes from the observation model of counts."""
        return self.decoding.mode == "expected" and model.var_stage.of_counts

    def empty(self, model: TwoStageVARST, n_spots: int) -> Prediction:
        """Allocate the arrays to be predicted, unfilled."""
        config = model.config
        n_tokens = config.n_tokens if self.tokens else 0
        sizes = (n_spots, config.n_genes, n_tokens, self.n_samples, len(self.quantiles))
        return Prediction.empty(*sizes, rates=self.is_of_counts(model))

    def __call__(
        self,
        model: TwoStageVARST,
        inputs: Histology,
        random_state: int,
        *,
        depth: Tensor | None = None,
        place: Tensor | None = None,
        first_row: int = 0,
        show_progress_bar: bool = False,
    ) -> Prediction:
        """Predict all given spots in batches.

        Parameters
        ----------
        model
            Model with both stages trained.
        inputs
            Histology inputs of the spots, aligned.
        random_state
            Seed of the draws.
        depth
            (n_spots,) total count of each spot; by default it is predicted.
        place
            (n_spots, 2) coordinates in the section that the model is adapted to; see
            :class:`histovar.model.Adaptation`.
        first_row
            Row of the first spot in the object, for messages.
        show_progress_bar
            Whether to show a progress bar.

        Raises
        ------
        ValueError
            If the prediction of a spot is not finite.
        """
        keep_freed_memory()
        model = model.in_precision(self.precision)
        n_spots = len(inputs.novelty)
        prediction = self.empty(model, n_spots)
        predict = self._predict_counts if self.is_of_counts(model) else self._predict_values
        with on_device(model, self.device) as device, full_precision(device):
            generator = torch.Generator(device).manual_seed(random_state)
            batches = torch.arange(n_spots).split(self.batch_size)
            for rows in progress(batches, "predicting", show=show_progress_bar):
                batch = inputs.map(lambda t: t[rows].to(device))  # noqa: B023
                batch_depth, batch_place = (None if t is None else t[rows].to(device) for t in (depth, place))
                batch_results = predict(model, batch, batch_depth, batch_place, generator)
                for field, result in zip(prediction, batch_results, strict=False):
                    if field is not None and result is not None:
                        field[rows.numpy()] = result.cpu().numpy().astype(field.dtype, copy=False)
        _check_finite(prediction, inputs, first_row)
        return prediction

    def _predict_values(
        self,
        model: TwoStageVARST,
        batch: Histology,
        depth: Tensor | None,
        place: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Tensor | None, ...]:
        """Mean, standard deviation, tokens, draws and quantiles, by a model that learnt from values without counts."""
        calibration = model.var_stage.calibration
        generated = model.predict(batch, self.decoding, tokens=self.tokens, generator=generator)
        mean, std = generated.expression, generated.std
        assert std is not None
        draws = self._draws(model, batch, generator)
        quantiles = mean.new_empty(*mean.shape, 0)
        if self.decoding.mode != "expected":
            std = draws.clamp(min=0).std(2, correction=0) if self.n_samples else std
        elif calibration.fitted:
            draws = calibration.draws(draws, mean, std) if self.n_samples else draws
            quantiles = calibration.quantiles(mean, std, self.quantiles)
            std = std * calibration.spread
        if len(self.quantiles) and not quantiles.shape[2]:
            quantiles = torch.quantile(draws, torch.tensor(self.quantiles, device=draws.device), 2).movedim(0, 2)
        return mean.clamp(min=0), std, generated.tokens, draws.clamp(min=0), quantiles.clamp(min=0)

    def _predict_counts(
        self,
        model: TwoStageVARST,
        batch: Histology,
        depth: Tensor | None,
        place: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Tensor | None, ...]:
        """The same by a model that learnt from counts, followed by rates and per-spot depth and uncertainty.

        Mean, standard deviation and quantiles come from the observation model. Draws take their values from it, gene by
        gene, and their ranks, and with them co-expression, from the tokens (Schefzik et al. 2013).
        """
        observation = model.var_stage.observation
        members = model.prior_members(batch)
        generated = model.predict(
            batch, self.decoding, members=members, tokens=self.tokens, std=False, generator=generator
        )
        composition = model.composition(batch, members)
        if bool(model.var_stage.head.gate.any()):
            composition = observation.shifted(composition, generated.expression)
        if model.var_stage.adaptation is not None:
            composition = model.var_stage.adaptation(composition, place)
        mean, std = observation.moments(composition, self.units, depth)
        draws = quantiles = mean.new_empty(*mean.shape, 0)
        if self.n_samples or len(self.quantiles):
            points = observation.points(composition, self.units, depth)
            quantiles = observation.ends(points, self.quantiles)
        if self.n_samples:
            ranks = self._draws(model, batch, generator).argsort(2).argsort(2)
            # Stratified: one random level in each of n_samples equal intervals.
            offsets = torch.rand(self.n_samples, generator=generator, device=mean.device)
            levels = (torch.arange(self.n_samples, device=mean.device) + offsets) / self.n_samples
            draws = observation.at_levels(points, levels).gather(2, ranks)
        _, log_depth, excess, depth_spread = composition
        spots = torch.stack([log_depth.exp(), excess, depth_spread, batch.novelty], 1)
        return mean, std, generated.tokens, draws, quantiles, RATE_TOTAL * composition.rates, spots

    def _draws(self, model: TwoStageVARST, batch: Histology, generator: torch.Generator) -> Tensor:
        """Draw tokens jointly and decode them to expression: (n_spots, n_genes, n_samples)."""
        n_spots = len(batch.novelty)
        if not self.n_samples:
            return batch.novelty.new_empty(n_spots, model.config.n_genes, 0)
        drawn = model.predict(
            batch, self.sampling, n_samples=self.n_samples, tokens=False, std=False, generator=generator
        )
        return drawn.expression.view(n_spots, self.n_samples, -1).transpose(1, 2)


def _check_finite(prediction: Prediction, inputs: Histology, first_row: int) -> None:
    """Refuse a prediction that is not finite, naming the spots and the likely cause."""
    n_spots = len(inputs.novelty)
    is_bad = np.zeros(n_spots, bool)
    for values in prediction:
        if values is not None:
            is_bad |= ~np.isfinite(values.reshape(n_spots, -1)).all(1)
    rows = np.flatnonzero(is_bad)
    if not len(rows):
        return
    magnitudes = [
        source[torch.from_numpy(rows)].abs().max() for source in (*inputs.sources, inputs.covariates) if source.numel()
    ]
    largest = float(torch.stack(magnitudes).max()) if magnitudes else 0.0
    if largest < FAR:
        reason = "their inputs are not unusual, so the model's weights are probably damaged: load or train it again"
    else:
        reason = (
            f"their standardised embeddings or covariates reach {largest:.3g}, where a few tens are usual: drop these "
            "spots, or correct the images or values that they come from"
        )
    raise ValueError(
        f"prediction: not finite in {len(rows)} of {n_spots} spots, first at row {first_row + rows[0]}; {reason}"
    )
