"""What is predicted of spots, whether they are all in memory or come in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from histovar._memory import keep_freed_memory
from histovar._progress import progress
from histovar.anndata_io.prediction import Prediction
from histovar.model import Decoding, Histology, TwoStageVARST
from histovar.model.two_stage import Precision

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
    n_samples, quantiles, batch_size, device, precision
        As in :func:`histovar.tl.predict`.
    """

    rule: Decoding
    chance: Decoding
    n_samples: int
    quantiles: tuple[float, ...]
    batch_size: int
    device: str
    precision: Precision

    def is_calibrated(self, model: TwoStageVARST) -> bool:
        """Whether the model's calibration applies."""
        return model.var_stage.calibration.fitted and self.rule.mode == "expected"

    def __call__(
        self,
        model: TwoStageVARST,
        inputs: Histology,
        random_state: int,
        *,
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
        calibration = model.var_stage.calibration
        n_spots, config = len(inputs.novelty), model.config
        made = Prediction.empty(n_spots, config.n_genes, config.n_tokens, self.n_samples, len(self.quantiles))
        with on_device(model, self.device) as where:
            generator = torch.Generator(where).manual_seed(random_state)
            levels, fitted = torch.tensor(self.quantiles, device=where), calibration.fitted
            batches = torch.arange(n_spots).split(self.batch_size)
            for rows in progress(batches, "predicting", show=show_progress_bar):
                batch = inputs.map(lambda t: t[rows].to(where))  # noqa: B023
                generated = model.predict(batch, self.rule, generator=generator)
                mean, std = generated.expression, generated.std
                draws = cube = mean.new_empty(*mean.shape, 0)
                if self.n_samples:
                    drawn = model.predict(batch, self.chance, n_samples=self.n_samples, generator=generator).expression
                    draws = drawn.view(len(rows), self.n_samples, -1).transpose(1, 2)
                if self.rule.mode != "expected":
                    std = draws.clamp(min=0).std(2, correction=0) if self.n_samples else std
                elif fitted:
                    draws = calibration.draws(draws, mean, std) if self.n_samples else draws
                    cube = calibration.quantiles(mean, std, levels)
                    std = std * calibration.spread
                if len(levels) and not cube.shape[2]:
                    cube = torch.quantile(draws, levels, 2).movedim(0, 2)
                parts = (mean.clamp(min=0), std, generated.tokens, draws.clamp(min=0), cube.clamp(min=0))
                for whole, part in zip(made, parts, strict=True):
                    if whole is not None:
                        whole[rows.numpy()] = part.cpu().numpy().astype(whole.dtype, copy=False)
        _check_finite(made, inputs, first_row)
        return made


def _check_finite(made: Prediction, inputs: Histology, first_row: int) -> None:
    """Refuse a prediction that is not finite, and say of which spots and why that may be."""
    n_spots = len(inputs.novelty)
    bad = np.zeros(n_spots, bool)
    for values in (made.mean, made.std, made.samples, made.quantiles):
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
