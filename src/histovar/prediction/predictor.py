"""What is predicted of spots, whether they are all in memory or come in chunks."""

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

# Standardised inputs beyond this are unlike any that a model was trained on.
FAR = 1e4


@dataclass(frozen=True)
class Predictor:
    """Mean, standard deviation, tokens, draws and quantiles, as :func:`histovar.tl.predict` was asked for them.

    Parameters
    ----------
    rule
        How tokens are chosen.
    chance
        How they are drawn.
    units, n_samples, quantiles, tokens, batch_size, device, precision
        As in :func:`histovar.tl.predict`.
    """

    rule: Decoding
    chance: Decoding
    units: Units
    n_samples: int
    quantiles: tuple[float, ...]
    tokens: bool
    batch_size: int
    device: str
    precision: Precision

    def is_calibrated(self, model: TwoStageVARST) -> bool:
        """Whether the model's calibration applies."""
        return self.rule.mode == "expected" and model.var_stage.is_calibrated

    def is_of_counts(self, model: TwoStageVARST) -> bool:
        """Whether the observation model makes the prediction."""
        return self.rule.mode == "expected" and model.var_stage.of_counts

    def empty(self, model: TwoStageVARST, n_spots: int) -> Prediction:
        """Room for what is to be predicted."""
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
        """Predict.

        Parameters
        ----------
        model
            With both stages trained.
        inputs
            Of the spots, aligned.
        random_state
            Seed of the draws.
        depth
            (n_spots,) total count of each spot; None predicts it.
        place
            (n_spots, 2) coordinates in the section that the model is adapted to; see
            :class:`histovar.model.Adaptation`.
        first_row
            Which of the object's spots the first is, for messages.
        show_progress_bar
            Show progress.

        Raises
        ------
        ValueError
            If the prediction of a spot is not finite.
        """
        keep_freed_memory()
        model = model.in_precision(self.precision)
        n_spots = len(inputs.novelty)
        of_counts = self.is_of_counts(model)
        made = self.empty(model, n_spots)
        predict = self._of_counts if of_counts else self._of_values
        with on_device(model, self.device) as where, full_precision(where):
            generator = torch.Generator(where).manual_seed(random_state)
            batches = torch.arange(n_spots).split(self.batch_size)
            for rows in progress(batches, "predicting", show=show_progress_bar):
                batch = inputs.map(lambda t: t[rows].to(where))  # noqa: B023
                known, near = (None if t is None else t[rows].to(where) for t in (depth, place))
                parts = predict(model, batch, known, near, generator)
                for whole, part in zip(made, parts, strict=False):
                    if whole is not None and part is not None:
                        whole[rows.numpy()] = part.cpu().numpy().astype(whole.dtype, copy=False)
        _check_finite(made, inputs, first_row)
        return made

    def _of_values(
        self,
        model: TwoStageVARST,
        batch: Histology,
        depth: Tensor | None,
        place: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Tensor | None, ...]:
        """Mean, standard deviation, tokens, draws and quantiles of a model that learnt from a layer of values."""
        calibration = model.var_stage.calibration
        generated = model.predict(batch, self.rule, tokens=self.tokens, generator=generator)
        mean, std = generated.expression, generated.std
        assert std is not None
        draws = self._draws(model, batch, generator)
        cube = mean.new_empty(*mean.shape, 0)
        if self.rule.mode != "expected":
            std = draws.clamp(min=0).std(2, correction=0) if self.n_samples else std
        elif calibration.fitted:
            draws = calibration.draws(draws, mean, std) if self.n_samples else draws
            cube = calibration.quantiles(mean, std, self.quantiles)
            std = std * calibration.spread
        if len(self.quantiles) and not cube.shape[2]:
            cube = torch.quantile(draws, torch.tensor(self.quantiles, device=draws.device), 2).movedim(0, 2)
        return mean.clamp(min=0), std, generated.tokens, draws.clamp(min=0), cube.clamp(min=0)

    def _of_counts(
        self,
        model: TwoStageVARST,
        batch: Histology,
        depth: Tensor | None,
        place: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Tensor | None, ...]:
        """The same of a model that learnt from counts, and composition and spots.

        Mean, standard deviation and quantiles are the observation model's. Draws take their values from it, gene by
        gene, and their ranks, and with them co-expression, from the tokens (Schefzik et al. 2013).
        """
        observation = model.var_stage.observation
        members = model.prior_members(batch)
        generated = model.predict(batch, self.rule, members=members, tokens=self.tokens, std=False, generator=generator)
        composition = model.composition(batch, members)
        if bool(model.var_stage.head.gate.any()):
            composition = observation.shifted(composition, generated.expression)
        if model.var_stage.adaptation is not None:
            composition = model.var_stage.adaptation(composition, place)
        mean, std = observation.moments(composition, self.units, depth)
        draws = cube = mean.new_empty(*mean.shape, 0)
        if self.n_samples or len(self.quantiles):
            points = observation.points(composition, self.units, depth)
            cube = observation.ends(points, self.quantiles)
        if self.n_samples:
            ranks = self._draws(model, batch, generator).argsort(2).argsort(2)
            # One at random of each of so many equal parts.
            place = torch.rand(self.n_samples, generator=generator, device=mean.device)
            levels = (torch.arange(self.n_samples, device=mean.device) + place) / self.n_samples
            draws = observation.at_levels(points, levels).gather(2, ranks)
        _, log_depth, excess, depth_spread = composition
        spots = torch.stack([log_depth.exp(), excess, depth_spread, batch.novelty], 1)
        return mean, std, generated.tokens, draws, cube, RATE_TOTAL * composition.rates, spots

    def _draws(self, model: TwoStageVARST, batch: Histology, generator: torch.Generator) -> Tensor:
        """Joint draws of the tokens, decoded: (n_spots, n_genes, n_samples)."""
        n_spots = len(batch.novelty)
        if not self.n_samples:
            return batch.novelty.new_empty(n_spots, model.config.n_genes, 0)
        drawn = model.predict(batch, self.chance, n_samples=self.n_samples, generator=generator).expression
        return drawn.view(n_spots, self.n_samples, -1).transpose(1, 2)


def _check_finite(made: Prediction, inputs: Histology, first_row: int) -> None:
    """Refuse a prediction that is not finite, and say of which spots and why that may be."""
    n_spots = len(inputs.novelty)
    bad = np.zeros(n_spots, bool)
    for values in made:
        if values is not None:
            bad |= ~np.isfinite(values.reshape(n_spots, -1)).all(1)
    rows = np.flatnonzero(bad)
    if not len(rows):
        return
    sizes = [
        source[torch.from_numpy(rows)].abs().max() for source in (*inputs.sources, inputs.covariates) if source.numel()
    ]
    largest = float(torch.stack(sizes).max()) if sizes else 0.0
    if largest < FAR:
        why = "their histology is nothing unusual, so the model's weights are likely damaged: load or train it again"
    else:
        why = (
            f"their standardised histology or covariates reach {largest:.3g}, where some tens are usual: drop those "
            "spots, or mend what they were embedded from"
        )
    raise ValueError(
        f"prediction: not finite in {len(rows)} of {n_spots} spots, first at row {first_row + rows[0]}; {why}"
    )
