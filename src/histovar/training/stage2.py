"""Training of stage 2: first the conditional-mean prior, then the token model that corrects it."""

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

from .data import CHUNK_SPOTS, Spots, collected, cross_fit_folds, held_out_spots
from .isolation import seeded
from .linear import fit_depth, fit_linear
from .options import TrainingOptions
from .resume import DIGEST, Digests, StageRun, identity
from .stage2_modules import Batch, PriorModule, Stage2Module, free_run
from .survey import Measured, surveyed
from .trainer import fit

logger = logging.getLogger(__name__)


# The prior's recipe: one-cycle AdamW, few epochs, strong decay.
PRIOR_EPOCHS = 30
# Of many spots, fewer epochs: no more steps than this.
PRIOR_STEPS = 10_000
# Small data need small batches, for there to be steps enough: a sixteenth of the spots, within these.
PRIOR_BATCH = (16, 256)
# A disagreement of members that none exceeds.
ANY_DISAGREEMENT = 1e6
# A spot of N counts weighs N / (N + this x the median): the log-normalised values of a shallow spot are noise.
HALF_WEIGHT = 0.3


class Stage2Trainer:
    """Trains stage 2 on histology and the tokens of a frozen stage 1.

    Parameters
    ----------
    model
        The model, with a trained stage 1 and a stage 2; it is trained in place.
    **options
        Fields of :class:`~histovar.training.TrainingOptions`; by default ``learning_rate`` is 2e-3 and
        ``averaging_decay`` 0.95.

    Raises
    ------
    TypeError, ValueError
        If an option is unknown, of another type or out of range.
    """

    # Enough for the loss on held-out sections of some hundred spots to level off; more data, more steps.
    steps = 60
    least_epochs = 4

    def __init__(self, model: TwoStageVARST, **options: Any) -> None:
        self.model = model
        self.options = self.checked_options(options)

    @staticmethod
    def checked_options(options: dict[str, Any]) -> TrainingOptions:
        """Options as the user gave them, with the defaults of this stage, checked."""
        return TrainingOptions.checked(options, learning_rate=2e-3, averaging_decay=0.95)

    def fit(self, parts: Iterable[Measured], n_spots: int, scratch: Path | None = None) -> None:
        """Train the prior, then the token model; restore the best weights and keep the history.

        Parameters
        ----------
        parts
            The training spots: all at once, or part after part, each of whole sections. They are gone through twice;
            what is learnt from then is a few kilobytes a spot. One section is held out to watch training.
        n_spots
            Number of spots of all parts.
        scratch
            Directory in which to keep that; None keeps it in memory, and `parts` is one part.

        Raises
        ------
        ValueError
            If there is a checkpoint to continue from that is of another training.
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
            self._expect(spots)
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
        decoded = free_run(model, [validation[chunk.numpy()] for chunk in rows])  # type: ignore[misc]
        stage2.head.gate.copy_(torch.tensor(decoded.gate))
        model.history["stage2"] = history
        logger.info(
            "stage 2: %d epochs on %s, inner held-out PCC %.3f (the prior alone: %.3f, %.0f %% of it linear), gate %s",
            len(history),
            "counts" if stage2.of_counts else "values",
            decoded.pcc,
            decoded.prior_pcc,
            0 if stage2.prior is None else 100 * float(stage2.prior.linear.share),
            [round(g, 2) for g in decoded.gate],
        )

    def _prepare(
        self, parts: Iterable[Measured], n_spots: int, scratch: Path | None
    ) -> tuple[Spots, tuple[NDArray[np.int64], NDArray[np.int64]], StageRun]:
        """Fit the condition, and put together what is learnt from, which spots to watch, and checkpoints."""
        model, seed = self.model, self.options.random_state
        stage2 = model.var_stage
        digests = Digests()
        survey = surveyed(self._digested(parts, digests), n_spots, seed)
        split = held_out_spots(survey.all_sections, n_spots, seed, survey.groups)
        max_epochs = self.options.epochs(len(split[0]), self.steps, self.least_epochs)
        run = StageRun(self.options, self._identity(digests), max_epochs)
        stage2.condition.fit(survey.histology, survey.sections, survey.moments)
        moments = survey.moments
        by = survey.all_sections, survey.coordinates, model.config.n_members, survey.groups
        folds = torch.from_numpy(cross_fit_folds(*by))
        totals = survey.total_counts
        if stage2.prior is not None:
            of_rates = survey.counts is not None and totals is not None
            stage2.prior.set_trained(of_rates=of_rates, n_folds=int(folds.max()) + 1)
            if survey.counts is not None and totals is not None:
                log_totals = np.log(totals.clip(1))
                stage2.prior.depth_mean.fill_(float(log_totals.mean()))
                stage2.prior.depth_std.fill_(max(float(log_totals.std()), 1e-3))
                # Half a count more, for genes that were not measured.
                stage2.observation.base.copy_((survey.counts + 0.5) / totals.sum())
        of_counts = stage2.of_counts
        weights = _weights(totals, n_spots)
        depths = torch.ones(n_spots, 1) if totals is None else torch.from_numpy(totals).float().clamp(min=1)[:, None]
        del survey  # which would be in memory while spots are read again

        def made() -> Iterator[Batch]:
            start = 0
            for part in parts:
                rows = slice(start, start := start + len(part.sections))
                histology = stage2.condition.align(part.histology, torch.from_numpy(part.sections), moments)
                histology = histology._replace(novelty=torch.zeros_like(histology.novelty))
                tokens = model.tokenize(part.expression)
                measured = part.counts if of_counts and part.counts is not None else part.expression
                room = measured.new_zeros(measured.shape if model.config.n_members else (len(measured), 0))
                yield histology, tokens, measured, folds[rows], weights[rows], depths[rows], room

        return collected(made(), n_spots, scratch), split, run

    @property
    def _has_checkpoints(self) -> bool:
        return self.options.checkpoint_dir is not None or self.options.resume_from is not None

    def _digested(self, parts: Iterable[Measured], digests: Digests) -> Iterator[Measured]:
        """The parts, as fingerprints are taken of them where there are checkpoints."""
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
        """What must be the same for training to be continued; nothing where there are no checkpoints."""
        if not self._has_checkpoints:
            return {}
        digests.update("gene panel", np.array(self.model.registry.get("genes", [])))
        data = {**digests.result(), "stage 1": DIGEST + fingerprint(self.model.stage1.state_dict())}
        return identity(2, self.options, self.model.config, data)

    def _fit_prior(self, spots: Spots, run: StageRun) -> None:
        """Train the prior, perceptrons and then the linear part, and measure how far from it the tokens lie."""
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
            # Where no spot has two members that have not seen it, it is not known what is usual.
            usual = unseen.disagreement[several].mean() if several.any() else torch.tensor(ANY_DISAGREEMENT)
            observation.usual_disagreement.copy_(usual)
            nothing = torch.zeros(len(features))
            composition = Composition(observation.base * unseen.mean, unseen.log_depth, nothing, nothing + 1)
            own = torch.Generator().manual_seed(self.options.random_state)
            observation.fit(measured, totals[:, 0], composition, None, generator=own)
            observation.calibrated.fill_(False)
        else:
            fit_linear(prior, features, model.stage1.scales.standardize(measured), weights, folds)
        means = unseen_means(model, histology, folds)
        pairs = zip(tokens.split(model.config.scales, 1), model.prior_mean(means), strict=True)
        values = [model.stage1.code_values(k)[ids] - guess for k, (ids, guess) in enumerate(pairs)]
        stage2.head.set_spread(values)

    def _expect(self, spots: Spots) -> None:
        """Note of each training spot what the prior's members that have not seen it expect."""
        if self.model.var_stage.prior is None:
            return
        self.model.var_stage.prior.eval()
        for rows in np.array_split(np.arange(len(spots)), max(1, len(spots) // CHUNK_SPOTS)):
            batch: Any = spots[rows]
            spots.fill_last(rows, unseen_means(self.model, batch[0], batch[3]))


@torch.no_grad()
def unseen_means(model: TwoStageVARST, histology: Histology, folds: Tensor) -> Tensor:
    """Standardised expression that members of the prior that have not seen the spots expect, (n_spots, n_genes)."""
    stage2 = model.var_stage
    assert stage2.prior is not None
    unseen = stage2.prior.out_of_fold(stage2.condition.features(histology), folds)
    return model.standardized_means(unseen.mean, unseen.log_depth)


def _weights(total_counts: NDArray[np.floating] | None, n_spots: int) -> Tensor:
    """Weight of every spot, 1 on average; ones where total counts are not known."""
    if total_counts is None or not total_counts.any():
        return torch.ones(n_spots)
    totals = torch.from_numpy(total_counts.astype(np.float32))
    weights = totals / (totals + HALF_WEIGHT * totals.median().clamp(min=1))
    return weights / weights.mean()
