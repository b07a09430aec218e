"""Lightning modules of stage 2: the conditional-mean prior, and the token model that corrects it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from histovar.metrics import mean_pearson
from histovar.model import Histology, ModelConfig, TwoStageVARST
from histovar.model.distributed import rank_and_world, take_own_rows
from histovar.model.negative_binomial import negative_log_likelihood

from .callbacks import diverged
from .options import TrainingOptions
from .trainer import StageModule

# Inputs, tokens, counts (expression where there are none), fold, weight, total count and what the prior expects.
Batch = tuple[Histology, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# Of the prior: AdamW with a one-cycle schedule and strong decay.
PRIOR_LEARNING_RATE = 2e-3
PRIOR_WEIGHT_DECAY = 0.1
# The genes' dispersions are learnt so much faster than weights, and do not decay.
DISPERSION_SPEED = 5.0
# Of a wide finest scale, each step learns another random third of the tokens, within these numbers: held-out sections
# have the same loss as with all genes in every step (benchmarks/token_training.py).
LEAST_GENES, MOST_GENES = 64, 1024
# Share of training spots that are fed the embeddings expected by the head in place of their true tokens.
EXPECTED_TEACHER = 0.5


def genes_per_step(config: ModelConfig) -> int:
    """Number of tokens of the finest scale that one training step learns; those of a narrow scale, all."""
    if not config.is_wide(len(config.scales) - 1):
        return config.n_genes
    return min(max(config.n_genes // 3, LEAST_GENES), MOST_GENES, config.n_genes)


class _Stage2Module(StageModule):
    """What both modules of stage 2 share.

    Parameters
    ----------
    model
        The model.
    options
        How to train.
    """

    def __init__(self, model: TwoStageVARST, options: TrainingOptions) -> None:
        super().__init__(options)
        # Not a submodule: averaging, checkpoints and optimiser must not touch the frozen stage 1, not by a bit.
        object.__setattr__(self, "model", model)

    model: TwoStageVARST

    def on_fit_start(self) -> None:
        """Lightning's hook: what a step needs beside what it trains."""
        self.model.stage1.to(self.device)
        self.model.var_stage.observation.to(self.device)


class PriorModule(_Stage2Module):
    """Lightning module of the conditional-mean prior, which it trains.

    By the likelihood of counts, whose dispersions are learnt along, where there are counts; else by the squared error
    of standardised expression.
    """

    def __init__(self, model: TwoStageVARST, options: TrainingOptions) -> None:
        super().__init__(model, options)
        self.prior = model.var_stage.prior
        self.log_dispersion = torch.nn.Parameter(torch.zeros(model.config.n_genes))
        if not model.var_stage.of_counts:
            self.log_dispersion.requires_grad_(False)
            assert self.prior is not None
            self.prior.depths.requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Lightning's hook."""
        histology, _, measured, folds, weights, totals, _ = batch
        assert self.prior is not None
        stage2 = self.model.var_stage

        def of_rates(rates: Tensor) -> Tensor:
            expected = stage2.observation.base * totals * rates
            return negative_log_likelihood(measured, expected, self.log_dispersion.exp()).mean(2)

        def of_values(values: Tensor) -> Tensor:
            return (values - self.model.stage1.scales.standardize(measured)).square().mean(2) * weights

        features = stage2.condition.features(histology)
        if stage2.of_counts:
            loss = self.prior.loss(features, of_rates, folds, totals.log())
        else:
            loss = self.prior.loss(features, of_values, folds)
        self.watch("prior", len(features), loss=loss / (2 * self.prior.config.n_members))
        return loss

    def configure_optimizers(self) -> Any:
        """Lightning's hook."""
        of_network = [p for name, p in self.named_parameters() if name != "log_dispersion"]
        rates = [PRIOR_LEARNING_RATE, DISPERSION_SPEED * PRIOR_LEARNING_RATE]
        groups: list[dict[str, Any]] = [{"params": of_network}, {"params": [self.log_dispersion], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=PRIOR_LEARNING_RATE, weight_decay=PRIOR_WEIGHT_DECAY)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Stage2Module(_Stage2Module):
    """Lightning module of the token model: trains condition, transformer and head; parameters as of its base."""

    def __init__(self, model: TwoStageVARST, options: TrainingOptions) -> None:
        super().__init__(model, options)
        self.stage2 = model.var_stage
        self._batches: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Lightning's hook."""
        histology, tokens, *_, prior = batch
        model = self.model
        teacher = model.token_embeddings(tokens)
        if model.config.style == "modern":
            expected = model.expected_teacher(histology, prior)
            _, world = rank_and_world()
            swap = take_own_rows(torch.rand(world * len(tokens), device=tokens.device)) < EXPECTED_TEACHER
            teacher = torch.where(swap[:, None, None], expected, teacher)
        genes = self._some_genes(random=True)
        loss = self._mean(model.token_loss(histology, tokens, prior, teacher, genes))
        self.watch("train", len(tokens), loss=loss, perplexity=loss.detach().exp())
        return loss

    def _some_genes(self, random: bool) -> Tensor | None:
        """The tokens of a wide finest scale to learn, or to watch, in one step; None for all."""
        config = self.model.config
        return self.some_genes(config.n_genes, genes_per_step(config), random=random)

    def _mean(self, losses: Tensor) -> Tensor:
        """Mean over spots and all tokens, (n_spots, tokens predicted), those of the finest scale for all of it."""
        config = self.model.config
        n_coarse = config.n_tokens - config.n_genes
        coarse, genes = losses[:, :n_coarse], losses[:, n_coarse:]
        return (coarse.sum(1) + genes.mean(1) * config.n_genes).mean() / config.n_tokens

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Lightning's hook."""
        histology, tokens, *_, prior = batch
        genes = self._some_genes(random=False)
        losses, rank = self.model.token_loss_and_rank(histology, tokens, prior, genes)
        loss = self._mean(losses)
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
        The spots.

    Returns
    -------
    FreeRun

    Raises
    ------
    FloatingPointError
        If predictions are not finite.
    """
    rows: list[list[tuple[Tensor, ...]]] = [[] for _ in model.config.scales]
    measured = []
    has_prior = model.var_stage.prior is not None
    for histology, tokens, found, _, _, totals, prior in batches:
        expected = model.predict(histology, means=prior, tokens=False, std=False).values
        means = model.prior_mean(prior) if has_prior else expected
        for k, ids in enumerate(tokens.split(model.config.scales, 1)):
            rows[k].append((model.stage1.code_values(k)[ids], means[k], expected[k]))
        measured.append(model.lognorm(found, totals) if model.var_stage.of_counts else found)
    gates, gated, alone = [], [], []
    for parts in rows:
        true_values, mean, value = (torch.cat(part) for part in zip(*parts, strict=True))
        gate = model.var_stage.head.best_gate(true_values, mean, value) if has_prior else torch.ones(())
        gates.append(float(gate))
        gated.append(torch.lerp(mean, value, float(gate)))
        alone.append(mean)
    truth = torch.cat(measured).cpu().numpy()
    predicted, of_prior = (model.stage1.assemble(values).cpu().numpy() for values in (gated, alone))
    if not (np.isfinite(predicted).all() and np.isfinite(of_prior).all()):
        raise diverged("stage 2: tokens", "predictions are not finite")
    pcc, prior_pcc = mean_pearson(predicted, truth), mean_pearson(of_prior, truth)
    return FreeRun(pcc, prior_pcc, gates)
