"""Lightning modules of stage 2: the conditional-mean prior, and the token model that corrects it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from histovar.metrics import mean_pearson
from histovar.model import Histology, TwoStageVARST
from histovar.model.distributed import rank_and_world, take_own_rows
from histovar.model.negative_binomial import negative_log_likelihood

from .callbacks import divergence_error
from .options import TrainingOptions
from .trainer import StageModule, genes_per_step

# Histology, tokens, counts (or expression, without counts), fold, weight, total count and prediction of the prior.
Batch = tuple[Histology, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# Training of the prior: AdamW with a one-cycle schedule and strong weight decay.
PRIOR_LEARNING_RATE = 2e-3
PRIOR_WEIGHT_DECAY = 0.1
# Learning rate of the genes' dispersions, relative to that of the weights; they have no weight decay.
DISPERSION_SPEED = 5.0
# Most genes of a wide finest scale whose tokens one training step predicts.
MOST_GENES = 1024
# Share of training spots whose inputs are expected embeddings instead of those of their true tokens.
EXPECTED_TEACHER = 0.5


class _Stage2Module(StageModule):
    """Base class of the Lightning modules of stage 2.

    Parameters
    ----------
    model
        The model.
    options
        Training options.
    """

    def __init__(self, model: TwoStageVARST, options: TrainingOptions) -> None:
        super().__init__(options)
        # Not a submodule: averaging, checkpoints and optimiser must not change the frozen stage 1 by a single bit.
        object.__setattr__(self, "model", model)

    model: TwoStageVARST

    def on_fit_start(self) -> None:
        """Move the frozen modules that a step needs to the device."""
        self.model.stage1.to(self.device)
        self.model.var_stage.observation.to(self.device)


class PriorModule(_Stage2Module):
    """Lightning module that trains the conditional-mean prior.

    The loss is the negative log likelihood of counts, with dispersions that are learnt, too; without counts, it is the
    squared error of standardised expression.
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
        """Loss of a training batch, summed over the members of the prior."""
        histology, _, measured, folds, weights, totals, _ = batch
        assert self.prior is not None
        stage2 = self.model.var_stage

        def score_rates(rates: Tensor) -> Tensor:
            expected = stage2.observation.base * totals * rates
            return negative_log_likelihood(measured, expected, self.log_dispersion.exp()).mean(2)

        def score_values(values: Tensor) -> Tensor:
            return (values - self.model.stage1.scales.standardize(measured)).square().mean(2) * weights

        features = stage2.condition.features(histology)
        if stage2.of_counts:
            loss = self.prior.loss(features, score_rates, folds, totals.log())
        else:
            loss = self.prior.loss(features, score_values, folds)
        self.watch("prior", len(features), loss=loss / (2 * self.prior.config.n_members))
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle schedule; dispersions have their own learning rate."""
        weights = [p for name, p in self.named_parameters() if name != "log_dispersion"]
        rates = [PRIOR_LEARNING_RATE, DISPERSION_SPEED * PRIOR_LEARNING_RATE]
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": [self.log_dispersion], "weight_decay": 0.0}]
        optimizer = self.adamw(groups, lr=PRIOR_LEARNING_RATE, weight_decay=PRIOR_WEIGHT_DECAY)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Stage2Module(_Stage2Module):
    """Lightning module that trains the token model: condition, transformer and head."""

    def __init__(self, model: TwoStageVARST, options: TrainingOptions) -> None:
        super().__init__(model, options)
        self.stage2 = model.var_stage
        self._batches: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a training batch."""
        histology, tokens, *_, prior = batch
        model = self.model
        teacher = model.token_embeddings(tokens)
        if model.config.style == "modern":
            expected = model.expected_teacher(histology, prior)
            _, world = rank_and_world()
            is_swapped = take_own_rows(torch.rand(world * len(tokens), device=tokens.device)) < EXPECTED_TEACHER
            teacher = torch.where(is_swapped[:, None, None], expected, teacher)
        genes = self._choose_genes(random=True)
        loss = self._mean_loss(model.token_loss(histology, tokens, prior, teacher, genes))
        self.watch("train", len(tokens), loss=loss, perplexity=loss.detach().exp())
        return loss

    def _choose_genes(self, random: bool) -> Tensor | None:
        """Choose the genes whose tokens a training step (random) or validation predicts; None for all."""
        config = self.model.config
        if not config.is_wide(len(config.scales) - 1):
            return None
        most = genes_per_step(config.n_genes, MOST_GENES) if random else MOST_GENES
        return self.choose_genes(config.n_genes, most, random=random)

    def _mean_loss(self, losses: Tensor) -> Tensor:
        """Mean loss over spots and tokens; the chosen genes are weighted as all genes are."""
        config = self.model.config
        n_coarse = config.n_tokens - config.n_genes
        coarse, genes = losses[:, :n_coarse], losses[:, n_coarse:]
        return (coarse.sum(1) + genes.mean(1) * config.n_genes).mean() / config.n_tokens

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of a validation batch."""
        histology, tokens, *_, prior = batch
        genes = self._choose_genes(random=False)
        losses, rank = self.model.token_loss_and_rank(histology, tokens, prior, genes)
        loss = self._mean_loss(losses)
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
        """Log the correlation of free-running expected decoding over all held-out spots, with the best gates."""
        self.watch("val", 1, pcc=free_run(self.model, self._batches).pcc)
        self._batches.clear()


class FreeRun(NamedTuple):
    """Mean Pearson correlation of expected decoding and of the prior alone, and the best gate of each scale."""

    pcc: float
    prior_pcc: float
    gate: list[float]


def free_run(model: TwoStageVARST, batches: Iterable[Batch]) -> FreeRun:
    """Decode held-out spots by expectation without their true tokens (free running), and choose the best gates.

    Parameters
    ----------
    model
        The model with open gates (all 1).
    batches
        Batches of spots that were not trained on.

    Returns
    -------
    FreeRun

    Raises
    ------
    FloatingPointError
        If predictions are not finite.
    """
    by_scale: list[list[tuple[Tensor, ...]]] = [[] for _ in model.config.scales]
    measured = []
    has_prior = model.var_stage.prior is not None
    for histology, tokens, values, _, _, totals, prior in batches:
        expected = model.predict(histology, means=prior, tokens=False, std=False).values
        means = model.prior_mean(prior) if has_prior else expected
        for k, ids in enumerate(tokens.split(model.config.scales, 1)):
            by_scale[k].append((model.stage1.code_values(k)[ids], means[k], expected[k]))
        measured.append(model.lognorm(values, totals) if model.var_stage.of_counts else values)
    gates, gated_values, prior_values = [], [], []
    for batches_of_scale in by_scale:
        true_values, mean, value = (torch.cat(tensors) for tensors in zip(*batches_of_scale, strict=True))
        gate = model.var_stage.head.best_gate(true_values, mean, value) if has_prior else torch.ones(())
        gates.append(float(gate))
        gated_values.append(torch.lerp(mean, value, float(gate)))
        prior_values.append(mean)
    truth = torch.cat(measured).cpu().numpy()
    predicted, prior_only = (model.stage1.assemble(v).cpu().numpy() for v in (gated_values, prior_values))
    if not (np.isfinite(predicted).all() and np.isfinite(prior_only).all()):
        raise divergence_error("stage 2: tokens", "predictions are not finite")
    pcc, prior_pcc = mean_pearson(predicted, truth), mean_pearson(prior_only, truth)
    return FreeRun(pcc, prior_pcc, gates)
