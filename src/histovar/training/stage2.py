"""Training of stage 2: first the conditional-mean prior, then the token model that corrects it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histovar.metrics import mean_pearson
from histovar.model import Histology, TwoStageVARST
from histovar.model.distributed import own_share, rank_and_world

from .data import SpotDataset, cross_fit_folds, held_out_spots, section_numbers
from .standardization import fit_condition
from .trainer import StageModule, TrainingOptions, fit, seeded

logger = logging.getLogger(__name__)

Batch = tuple[Histology, Tensor, Tensor, Tensor]

# The prior's recipe: one-cycle AdamW, few epochs, strong decay.
PRIOR_EPOCHS = 30
PRIOR_LEARNING_RATE = 2e-3
PRIOR_WEIGHT_DECAY = 0.1
# Small data need small batches, for there to be steps enough: a sixteenth of the spots, within these.
PRIOR_BATCH = (16, 64)
# A spot of N counts weighs N / (N + this x the median): the log-normalised values of a shallow spot are noise.
HALF_WEIGHT = 0.3
# Of a wide finest scale, tokens that are learnt in one step; the next step draws others.
GENES_AT_ONCE = 1024
# Share of training spots that are fed the embeddings expected by the head in place of their true tokens.
EXPECTED_TEACHER = 0.5


class PriorModule(StageModule):
    """Lightning module of the conditional-mean prior.

    Parameters
    ----------
    model
        The model; the prior of its stage 2 is trained.
    options
        How to train.
    n_folds
        Number of folds of the training spots.
    """

    def __init__(self, model: TwoStageVARST, options: TrainingOptions, n_folds: int) -> None:
        super().__init__(options)
        self.prior = model.var_stage.prior
        self.n_folds = n_folds

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Lightning's hook."""
        features, targets, weights, folds = batch
        assert self.prior is not None
        loss = self.prior.loss(features, targets, weights, folds, self.n_folds)
        self.watch("prior", len(features), loss=loss / self.prior.config.n_members)
        return loss

    def configure_optimizers(self) -> Any:
        """Lightning's hook."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=PRIOR_LEARNING_RATE, weight_decay=PRIOR_WEIGHT_DECAY)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRIOR_LEARNING_RATE, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Stage2Module(StageModule):
    """Lightning module of the token model.

    Parameters
    ----------
    model
        The model; condition, transformer and head of its stage 2 are trained.
    options
        How to train.
    """

    def __init__(self, model: TwoStageVARST, options: TrainingOptions) -> None:
        super().__init__(options)
        self.stage2 = model.var_stage
        # Not a submodule: averaging, checkpoints and optimiser must not touch the frozen stage 1, not by a bit.
        object.__setattr__(self, "model", model)
        self._batches: list[Batch] = []

    model: TwoStageVARST

    def on_fit_start(self) -> None:
        """Lightning's hook."""
        self.model.stage1.to(self.device)

    def training_step(self, batch: tuple[Histology, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Lightning's hook."""
        histology, tokens, prior = batch
        model = self.model
        teacher = model.token_embeddings(tokens)
        if model.config.style == "modern":
            expected = model.expected_teacher(histology, prior)
            _, world = rank_and_world()
            swap = own_share(torch.rand(world * len(tokens), device=tokens.device)) < EXPECTED_TEACHER
            teacher = torch.where(swap[:, None, None], expected, teacher)
        genes = self._some_genes(random=True)
        loss = self._mean(model.token_loss(histology, tokens, prior, teacher, genes))
        self.watch("train", len(tokens), loss=loss, perplexity=loss.detach().exp())
        return loss

    def _some_genes(self, random: bool) -> Tensor | None:
        """The tokens of a wide finest scale to learn, or to watch, in one step; None for all."""
        config = self.model.config
        if not config.is_wide(len(config.scales) - 1) or config.n_genes <= GENES_AT_ONCE:
            return None
        if random:
            return torch.randperm(config.n_genes, device=self.device)[:GENES_AT_ONCE].sort().values
        return torch.arange(GENES_AT_ONCE, device=self.device) * config.n_genes // GENES_AT_ONCE

    def _mean(self, losses: Tensor) -> Tensor:
        """Mean over spots and all tokens, (n_spots, tokens predicted), those of the finest scale for all of it."""
        config = self.model.config
        n_coarse = config.n_tokens - config.n_genes
        coarse, genes = losses[:, :n_coarse], losses[:, n_coarse:]
        return (coarse.sum(1) + genes.mean(1) * config.n_genes).mean() / config.n_tokens

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Lightning's hook."""
        histology, tokens, prior, _ = batch
        genes = self._some_genes(random=False)
        loss = self._mean(self.model.token_loss(histology, tokens, prior, None, genes))
        rank = self.model.token_rank(histology, tokens, prior, genes)
        self.watch(
            "val",
            len(tokens),
            loss=loss,
            perplexity=loss.exp(),
            accuracy=(rank == 0).float().mean(),
            top5_accuracy=(rank < 5).float().mean(),
        )
        self._batches.append(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the correlation of free-running expected decoding over all held-out spots, with the best gate."""
        self.watch("val", 1, pcc=free_run(self.model, self._batches).pcc)
        self._batches.clear()


class FreeRun(NamedTuple):
    """Correlation of expected decoding, that of the prior alone, and the gate between them."""

    pcc: float
    prior_pcc: float
    gate: list[float]


def free_run(model: TwoStageVARST, batches: Iterable[Batch]) -> FreeRun:
    """Expected decoding of spots not trained on, without their tokens, gated as suits them best.

    Parameters
    ----------
    model
        The model, its gate open.
    batches
        Histology, tokens, prior and expression.

    Returns
    -------
    FreeRun
    """
    rows: list[list[tuple[Tensor, ...]]] = [[] for _ in model.config.scales]
    measured = []
    has_prior = model.var_stage.prior is not None
    for histology, tokens, prior, expression in batches:
        expected = model.predict(histology, members=prior[None]).values
        means = model.prior_mean(prior) if has_prior else expected
        for k, ids in enumerate(tokens.split(model.config.scales, 1)):
            rows[k].append((model.stage1.code_values(k)[ids], means[k], expected[k]))
        measured.append(expression)
    gates, gated, alone = [], [], []
    for parts in rows:
        true_values, mean, value = (torch.cat(part) for part in zip(*parts, strict=True))
        gate = model.var_stage.head.best_gate(true_values, mean, value) if has_prior else torch.ones(())
        gates.append(float(gate))
        gated.append(torch.lerp(mean, value, float(gate)))
        alone.append(mean)
    truth = torch.cat(measured).cpu().numpy()
    pcc, prior_pcc = (mean_pearson(model.stage1.assemble(v).cpu().numpy(), truth) for v in (gated, alone))
    return FreeRun(pcc, prior_pcc, gates)


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
    ValueError
        If an option is out of range.
    """

    # Enough for the loss on held-out sections of some hundred spots to level off; more data, more steps.
    steps = 60
    least_epochs = 4

    def __init__(self, model: TwoStageVARST, **options: Any) -> None:
        self.model = model
        self.options = TrainingOptions(**{"learning_rate": 2e-3, "averaging_decay": 0.95, **options})

    def fit(
        self,
        histology: Histology,
        expression: Tensor,
        coordinates: NDArray[np.floating],
        sections: NDArray[Any] | None = None,
        total_counts: NDArray[np.floating] | None = None,
    ) -> None:
        """Train the prior, then the token model; restore the best weights and keep the history.

        Parameters
        ----------
        histology
            Inputs of the training spots.
        expression
            (n_spots, n_genes) in layer units.
        coordinates
            (n_spots, 2), for folds within sections.
        sections
            (n_spots,) section of each spot; one of them is held out to watch training.
        total_counts
            (n_spots,) total count of every spot, where known: what weighs the spots of the prior, and its depth.
        """
        options, model = self.options, self.model
        stage2 = model.var_stage
        stage2.transformer.parents.copy_(model.stage1.scales.parents())
        stage2.head.set_codes(model.stage1)
        stage2.head.gate.fill_(1)
        tokens = torch.cat([model.tokenize(part) for part in expression.split(1024)])
        seen, watched = held_out_spots(sections, len(expression), options.random_state)
        with seeded(options.random_state):
            numbers = section_numbers(sections, len(expression))
            targets = model.stage1.scales.standardize(expression)
            fit_condition(stage2.condition, histology, numbers, targets, options.random_state)
            histology = stage2.condition.align(histology, numbers)._replace(novelty=torch.zeros(len(expression)))
            prior = self._fit_prior(histology, expression, tokens, coordinates, sections, total_counts)
            model.set_training_stage(2)
            if stage2.prior is not None:
                stage2.prior.requires_grad_(False).eval()
            spots = SpotDataset(histology, tokens, prior, expression)
            train, validation = SpotDataset(*spots[seen][:3]), SpotDataset(*spots[watched])
            module = Stage2Module(model, options)
            history = fit(
                module,
                train,
                validation,
                options,
                max_epochs=options.epochs(len(seen), self.steps, self.least_epochs),
                monitor="val_loss",
            )
        model.cpu().eval().requires_grad_(False)
        rows = torch.arange(len(validation)).split(options.batch_size)
        run = free_run(model, [validation[chunk.numpy()] for chunk in rows])  # type: ignore[misc]
        stage2.head.gate.copy_(torch.tensor(run.gate))
        model.history["stage2"] = history
        logger.info(
            "stage 2: %d epochs, inner held-out PCC %.3f (the prior alone: %.3f), gate %s, %s statistics",
            len(history),
            run.pcc,
            run.prior_pcc,
            [round(g, 2) for g in run.gate],
            "each section's own" if stage2.condition.uses_own_statistics else "training's",
        )

    def _fit_prior(
        self,
        histology: Histology,
        expression: Tensor,
        tokens: Tensor,
        coordinates: NDArray[np.floating],
        sections: NDArray[Any] | None,
        total_counts: NDArray[np.floating] | None,
    ) -> Tensor:
        """Train the prior and return what it says of each training spot without having seen it."""
        model = self.model
        prior = model.var_stage.prior
        if prior is None:
            return torch.zeros(len(expression), 0)
        prior.requires_grad_(True).train()
        folds = torch.from_numpy(cross_fit_folds(sections, coordinates, model.config.n_members))
        n_folds = int(folds.max()) + 1
        features = model.var_stage.condition.features(histology)
        depth, weights = torch.zeros(len(expression)), torch.ones(len(expression))
        if total_counts is not None and total_counts.any():
            totals = torch.from_numpy(total_counts.astype(np.float32))
            weights = totals / (totals + HALF_WEIGHT * totals.median().clamp(min=1))
            weights = weights / weights.mean()
            depth = totals.log1p()
            depth = (depth - depth.mean()) / depth.std(correction=0).clamp(min=1e-6)
        targets = torch.cat([model.stage1.scales.standardize(expression), depth[:, None]], 1)
        module = PriorModule(model, self.options, n_folds)
        data = SpotDataset(features, targets, weights, folds)
        least, most = PRIOR_BATCH
        batch_size = max(least, min(most, len(features) // 16)) // self.options.world_size
        options = replace(self.options, batch_size=max(1, min(self.options.batch_size, batch_size)))
        fit(module, data, None, options, max_epochs=PRIOR_EPOCHS, averaging=False, resumable=False)
        prior.eval()
        unseen = prior.out_of_fold(features, folds, n_folds)
        parts = zip(tokens.split(model.config.scales, 1), model.prior_mean(unseen), strict=True)
        values = [model.stage1.code_values(k)[ids] - guess for k, (ids, guess) in enumerate(parts)]
        model.var_stage.head.set_spread(values)
        return unseen
