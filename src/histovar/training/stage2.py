"""Train stage 2 with Lightning: first the conditional-mean prior, then the token model that corrects it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histovar._spots import sampled_spots
from histovar.model import Histology, TwoStageVARST
from histovar.model.observation import Composition
from histovar.model.weights import fingerprint

from .data import CHUNK_SPOTS, Spots, collect_spots, cross_fit_folds, held_out_spots
from .isolation import seeded
from .linear import fit_depth, fit_linear
from .options import TrainingOptions
from .resume import DIGEST, Digests, StageRun, identity
from .stage2_modules import Batch, PriorModule, Stage2Module, free_run
from .statistics import MeasuredSpots, collect_statistics
from .trainer import fit

logger = logging.getLogger(__name__)


# Epochs of the prior (one-cycle AdamW with strong weight decay), at most.
PRIOR_EPOCHS = 30
# Steps of the prior, at most: with many spots there are fewer epochs.
PRIOR_STEPS = 10_000
# Batch size of the prior: a sixteenth of the spots, within these limits, so that small data give enough steps.
PRIOR_BATCH = (16, 256)
# A disagreement between members that is never exceeded.
ANY_DISAGREEMENT = 1e6
# A spot of N counts has the weight N / (N + HALF_WEIGHT x median): log-normalised values of shallow spots are noisy.
HALF_WEIGHT = 0.3


class Stage2Trainer:
    """Trains stage 2 on histology and the tokens of a frozen stage 1.

    Parameters
    ----------
    model
        The model with a trained stage 1, and a stage 2 that is trained in place.
    **options
        Fields of :class:`~histovar.training.TrainingOptions`; by default ``learning_rate`` is 2e-3 and
        ``averaging_decay`` 0.95.

    Raises
    ------
    TypeError, ValueError
        If an option is unknown, has the wrong type or is out of range.
    """

    # Enough for the loss on held-out sections to level off with a few hundred spots; more data give more steps.
    steps = 60
    least_epochs = 4

    def __init__(self, model: TwoStageVARST, **options: Any) -> None:
        self.model = model
        self.options = self.checked_options(options)

    @staticmethod
    def checked_options(options: dict[str, Any]) -> TrainingOptions:
        """Make checked training options from a user's dictionary, with the defaults of this stage."""
        return TrainingOptions.checked(options, learning_rate=2e-3, averaging_decay=0.95)

    def fit(self, parts: Iterable[MeasuredSpots], n_spots: int, scratch: Path | None = None) -> None:
        """Train the prior, then the token model; restore the best weights and keep the history.

        Parameters
        ----------
        parts
            Training spots, in one part or in several of whole sections. They are iterated over twice; what is kept for
            training takes a few kilobytes for each spot. One section is held out to monitor training.
        n_spots
            Number of spots in all parts.
        scratch
            Directory for that; None keeps it in memory, with all spots in one part.

        Raises
        ------
        ValueError
            If the checkpoint to resume from is from a different training run.
        FloatingPointError
            If training diverges.
        """
        options, model = self.options, self.model.cpu()
        stage2 = model.var_stage
        stage2.transformer.parents.copy_(model.stage1.scales.parents())
        stage2.head.set_codes(model.stage1)
        stage2.head.gate.fill_(1)
        with seeded(options.random_state):
            spots, (seen, watched), run = self._prepare(parts, n_spots, scratch)
            module = Stage2Module(model, options)
            if run.state is None:
                self._fit_prior(spots, run)
            else:
                module.load_state_dict(run.state)
            self._store_prior_means(spots)
            run.save_start(module)
            model.set_training_stage(2)
            if stage2.prior is not None:
                stage2.prior.requires_grad_(False).eval()
            train, validation = spots.take(seen), spots.take(watched)
            history = fit(
                module,
                train,
                validation,
                options,
                step="stage 2: tokens",
                max_epochs=options.epochs(len(seen), self.steps, self.least_epochs),
                run=run,
            )
        model.cpu().eval().requires_grad_(False)
        rows = torch.arange(len(validation)).split(options.batch_size)
        result = free_run(model, [validation[batch.numpy()] for batch in rows])  # type: ignore[misc]
        stage2.head.gate.copy_(torch.tensor(result.gate))
        model.history["stage2"] = history
        logger.info(
            "stage 2: %d epochs on %s, inner held-out PCC %.3f (the prior alone: %.3f, %.0f %% of it linear), gate %s",
            len(history),
            "counts" if stage2.of_counts else "values",
            result.pcc,
            result.prior_pcc,
            0 if stage2.prior is None else 100 * float(stage2.prior.linear.share),
            [round(g, 2) for g in result.gate],
        )

    def _prepare(
        self, parts: Iterable[MeasuredSpots], n_spots: int, scratch: Path | None
    ) -> tuple[Spots, tuple[NDArray[np.int64], NDArray[np.int64]], StageRun]:
        """Fit the condition; return the data set, rows to learn from and to monitor, and the checkpoints to resume."""
        model, seed = self.model, self.options.random_state
        stage2 = model.var_stage
        digests = Digests()
        statistics = collect_statistics(self._add_digests(parts, digests), n_spots, seed)
        split = held_out_spots(statistics.all_sections, n_spots, seed, statistics.groups)
        max_epochs = self.options.epochs(len(split[0]), self.steps, self.least_epochs)
        run = StageRun(self.options, self._identity(digests), max_epochs)
        moments = statistics.moments
        stage2.condition.fit(statistics.histology, statistics.sections, moments)
        folds = torch.from_numpy(
            cross_fit_folds(statistics.all_sections, statistics.coordinates, model.config.n_members, statistics.groups)
        )
        totals = statistics.total_counts
        if stage2.prior is not None:
            of_rates = statistics.counts is not None and totals is not None
            stage2.prior.set_trained(of_rates=of_rates, n_folds=int(folds.max()) + 1)
            if statistics.counts is not None and totals is not None:
                log_totals = np.log(totals.clip(1))
                stage2.prior.depth_mean.fill_(float(log_totals.mean()))
                stage2.prior.depth_std.fill_(max(float(log_totals.std()), 1e-3))
                # Half a count is added, so that genes without counts have a positive rate.
                stage2.observation.base.copy_((statistics.counts + 0.5) / totals.sum())
        of_counts = stage2.of_counts
        weights = _weights(totals, n_spots)
        depths = torch.ones(n_spots, 1) if totals is None else torch.from_numpy(totals).float().clamp(min=1)[:, None]
        del statistics  # free its memory before the spots are read again

        def items() -> Iterator[Batch]:
            start = 0
            for part in parts:
                rows = slice(start, start := start + len(part.sections))
                histology = stage2.condition.align(part.histology, torch.from_numpy(part.sections), moments)
                histology = histology._replace(novelty=torch.zeros_like(histology.novelty))
                tokens = model.tokenize(part.expression)
                measured = part.counts if of_counts and part.counts is not None else part.expression
                prior_means = measured.new_zeros(measured.shape if model.config.n_members else (len(measured), 0))
                yield histology, tokens, measured, folds[rows], weights[rows], depths[rows], prior_means

        return collect_spots(items(), n_spots, scratch), split, run

    @property
    def _has_checkpoints(self) -> bool:
        """Whether checkpoints are written or resumed from."""
        return self.options.checkpoint_dir is not None or self.options.resume_from is not None

    def _add_digests(self, parts: Iterable[MeasuredSpots], digests: Digests) -> Iterator[MeasuredSpots]:
        """Yield the parts unchanged, adding them to the fingerprints if there are checkpoints."""
        for part in parts:
            if self._has_checkpoints:
                histology = part.histology
                digests.update("embeddings", *histology.sources)
                digests.update("coordinates", histology.coordinates, part.coordinates)
                digests.update("covariates", histology.covariates)
                digests.update("expression", part.expression)
                digests.update("sections", part.sections)
                digests.update("groups", part.groups)
                digests.update("total counts", part.total_counts)
            yield part

    def _identity(self, digests: Digests) -> dict[str, str]:
        """Identity of the training run, see :func:`identity`; empty without checkpoints."""
        if not self._has_checkpoints:
            return {}
        digests.update("gene panel", np.array(self.model.registry.get("genes", [])))
        data = {**digests.result(), "stage 1": DIGEST + fingerprint(self.model.stage1.state_dict())}
        return identity(2, self.options, self.model.config, data)

    def _fit_prior(self, spots: Spots, run: StageRun) -> None:
        """Train the prior's perceptrons, fit its linear part, and set the spread of the tokens around it."""
        model, stage2 = self.model, self.model.var_stage
        prior = stage2.prior
        if prior is None:
            return
        prior.requires_grad_(True).train()
        least, most = PRIOR_BATCH
        batch_size = max(1, max(least, min(most, len(spots) // 16)) // self.options.world_size)
        options = replace(self.options, batch_size=batch_size, limit_train_batches=PRIOR_STEPS)
        epochs = max(1, min(PRIOR_EPOCHS, PRIOR_STEPS // options.batches(len(spots))))
        module = PriorModule(model, options)
        fit(module, spots, None, options, step="stage 2: prior", max_epochs=epochs, run=run, averaging=False)
        model.cpu()
        prior.eval()
        batch: Any = spots[sampled_spots(len(spots), options.random_state)]
        histology, tokens, measured, folds, weights, totals, _ = batch
        features = stage2.condition.features(histology)
        observation = stage2.observation
        if stage2.of_counts:
            fit_linear(prior, features, measured / (observation.base * totals), weights, folds)
            fit_depth(prior, features, totals.log(), folds)
            unseen = prior.out_of_fold(features, folds)
            several = unseen.n_members > 1
            # Without two members that have not seen a spot, their usual disagreement is unknown.
            usual = unseen.disagreement[several].mean() if several.any() else torch.tensor(ANY_DISAGREEMENT)
            observation.usual_disagreement.copy_(usual)
            no_excess = torch.zeros(len(features))
            composition = Composition(observation.base * unseen.mean, unseen.log_depth, no_excess, no_excess + 1)
            generator = torch.Generator().manual_seed(self.options.random_state)
            observation.fit(measured, totals[:, 0], composition, None, generator=generator)
            observation.calibrated.fill_(False)
        else:
            fit_linear(prior, features, model.stage1.scales.standardize(measured), weights, folds)
        means = unseen_means(model, histology, folds)
        pairs = zip(tokens.split(model.config.scales, 1), model.prior_mean(means), strict=True)
        errors = [model.stage1.code_values(k)[ids] - mean for k, (ids, mean) in enumerate(pairs)]
        stage2.head.set_spread(errors)

    def _store_prior_means(self, spots: Spots) -> None:
        """Store the prior's out-of-fold prediction of each training spot as the last item of the data set."""
        if self.model.var_stage.prior is None:
            return
        self.model.var_stage.prior.eval()
        for rows in np.array_split(np.arange(len(spots)), max(1, len(spots) // CHUNK_SPOTS)):
            batch: Any = spots[rows]
            spots.fill_last(rows, unseen_means(self.model, batch[0], batch[3]))


@torch.no_grad()
def unseen_means(model: TwoStageVARST, histology: Histology, folds: Tensor) -> Tensor:
    """Predict standardised expression of training spots by members of the prior that did not see them."""
    stage2 = model.var_stage
    assert stage2.prior is not None
    unseen = stage2.prior.out_of_fold(stage2.condition.features(histology), folds)
    return model.standardized_means(unseen.mean, unseen.log_depth)


def _weights(total_counts: NDArray[np.floating] | None, n_spots: int) -> Tensor:
    """Weights of spots by their total counts, 1 on average; all 1 if total counts are not known."""
    if total_counts is None or not total_counts.any():
        return torch.ones(n_spots)
    totals = torch.from_numpy(total_counts.astype(np.float32))
    weights = totals / (totals + HALF_WEIGHT * totals.median().clamp(min=1))
    return weights / weights.mean()
