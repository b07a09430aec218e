"""Train stage 1, the multi-scale gene VQ-VAE, with Lightning."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histovar._spots import sampled_spots
from histovar.metrics import mean_pearson
from histovar.model import TwoStageVARST
from histovar.model.quantizer import perplexity, usage
from histovar.model.vqvae import Stage1Losses

from .callbacks import divergence_error
from .data import Spots, held_out_spots
from .isolation import seeded
from .options import TrainingOptions
from .resume import Digests, StageRun, identity
from .trainer import StageModule, fit, genes_per_step

logger = logging.getLogger(__name__)

# Steps of warm-up as a plain autoencoder, without quantisation, before the codebook is initialised.
WARMUP_STEPS = 200
WARMUP_LEARNING_RATE = 1e-3
# Spots that initialise the codebook (k-means): plenty for 4096 codes, and quick.
SPOTS_FOR_START = 4096
# Most genes that one step takes.
MOST_GENES = 256
# Rows that are fingerprinted at once.
ROWS_AT_ONCE = 8192


class Stage1Module(StageModule):
    """Lightning module of stage 1.

    Parameters
    ----------
    model
        The model whose stage 1 is trained.
    options
        Training options.
    """

    def __init__(self, model: TwoStageVARST, options: TrainingOptions) -> None:
        super().__init__(options)
        self.stage1 = model.stage1
        self._watched: list[tuple[Tensor, Tensor, Tensor]] = []

    def _step(self, expression: Tensor, genes: Tensor | None, prefix: str) -> Stage1Losses:
        """Compute and log the losses of a batch."""
        losses: Stage1Losses = self.stage1(expression, genes)
        self.watch(
            prefix,
            len(expression),
            loss=losses.total,
            reconstruction=losses.reconstruction,
            hierarchical=losses.hierarchical,
            vq=losses.vq,
        )
        return losses

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Loss of a training batch."""
        genes = self._choose_genes(random=True)
        return self._step(batch[0], genes, "train").total

    def _choose_genes(self, random: bool) -> Tensor | None:
        """Choose the genes that a step reconstructs, which share one encoder; None for all."""
        n_genes = self.stage1.config.n_genes
        return self.choose_genes(n_genes, genes_per_step(n_genes, MOST_GENES), random=random)

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        """Losses of a validation batch."""
        genes = self._choose_genes(random=False)
        losses = self._step(batch[0], genes, "val")
        measured = batch[0] if genes is None else batch[0][:, genes]
        self._watched.append((losses.tokens, losses.rebuilt, measured))

    def on_validation_epoch_end(self) -> None:
        """Log codebook usage and the correlation of the reconstruction over all held-out spots."""
        tokens, rebuilt, measured = (torch.cat(batches) for batches in zip(*self._watched, strict=True))
        self._watched.clear()
        config = self.stage1.config
        counts = usage(tokens, config.codebook_size)
        self.watch("val", 1, usage=(counts > 0).float().mean(), perplexity=perplexity(counts.float()))
        coarser = config.scales[:-1]
        for k, ids in enumerate(tokens.split((*coarser, tokens.shape[1] - sum(coarser)), 1)):
            counts = usage(ids, config.codebook_size)
            values = {
                f"usage_scale{k}": (counts > 0).float().mean(),
                f"perplexity_scale{k}": perplexity(counts.float()),
            }
            self.watch("val", 1, **values)
        if not bool(torch.isfinite(rebuilt).all()):
            raise divergence_error("stage 1: codebook", f"epoch {self.current_epoch}: reconstruction is not finite")
        self.watch("val", 1, pcc=mean_pearson(rebuilt.cpu().numpy(), measured.cpu().numpy()))


class Stage1Trainer:
    """Trains stage 1, the gene tokens, on expression alone.

    Parameters
    ----------
    model
        The model, trained in place.
    **options
        Fields of :class:`~histovar.training.TrainingOptions`; by default ``learning_rate`` is 1e-4, so
        small because codes do not keep up with encoders that change fast.

    Raises
    ------
    TypeError, ValueError
        If an option is unknown, has the wrong type or is out of range.
    """

    # Few, as the warm-up has done most of the work: they adjust codes, encoders and decoders to each other.
    steps = 40
    least_epochs = 2

    def __init__(self, model: TwoStageVARST, **options: Any) -> None:
        self.model = model
        self.options = self.checked_options(options)

    @staticmethod
    def checked_options(options: dict[str, Any]) -> TrainingOptions:
        """Make checked training options from a user's dictionary, with the defaults of this stage."""
        return TrainingOptions.checked(options, learning_rate=1e-4)

    def fit(
        self,
        spots: Spots,
        groups: NDArray[np.integer],
        sections: NDArray[Any] | None = None,
        individuals: NDArray[Any] | None = None,
    ) -> None:
        """Train, restore the best weights, count the codes and keep the history.

        Parameters
        ----------
        spots
            Expression, (n_spots, n_genes) in layer units.
        groups
            (n_scales, n_genes) nested gene groups.
        sections
            (n_spots,) section of each spot; one is held out to monitor training.
        individuals
            (n_spots,) individual of each spot; if there are three or more, one is held out instead of a section.

        Raises
        ------
        ValueError
            If the checkpoint to resume from is from a different training run.
        FloatingPointError
            If training diverges.
        """
        options, model = self.options, self.model.cpu()
        model.set_training_stage(1)
        seen, watched = held_out_spots(sections, len(spots), options.random_state, individuals)
        train = spots.take(seen)
        (sample,) = spots[sampled_spots(len(spots), options.random_state)]
        assert isinstance(sample, Tensor)
        max_epochs = options.epochs(len(train), self.steps, self.least_epochs)
        run = StageRun(options, self._identity(spots, groups, sections), max_epochs)
        with seeded(options.random_state):
            model.stage1.scales.fit(sample, groups, options.random_state)
            module = Stage1Module(model, options)
            if run.state is not None:
                module.load_state_dict(run.state)
            elif model.stage1.quantizer.needs_start:
                # Codes that are placed while encoders still change fast soon die, so the encoders warm up first.
                short = replace(options, max_epochs=None, limit_train_batches=WARMUP_STEPS)
                warmup = short.epochs(len(train), WARMUP_STEPS)
                warmup_module = Stage1Module(model, replace(short, learning_rate=WARMUP_LEARNING_RATE))
                fit(warmup_module, train, None, short, step="stage 1: warm-up", max_epochs=warmup, averaging=False)
                (start,) = train[torch.randperm(len(train))[:SPOTS_FOR_START].numpy()]
                assert isinstance(start, Tensor)
                model.stage1.start_codebook(start)
            run.save_start(module)
            history = fit(
                module,
                train,
                spots.take(watched),
                options,
                step="stage 1: codebook",
                max_epochs=max_epochs,
                run=run,
            )
        model.eval().requires_grad_(False)
        model.stage1.count_codes(model.tokenize(sample))
        model.history["stage1"] = history
        used = int((model.stage1.code_counts.sum(0) > 0).sum())
        logger.info(
            "stage 1: %d epochs, inner held-out reconstruction PCC %.3f, %d of %d codes in use",
            len(history),
            history["val_pcc"].max(),
            used,
            model.config.codebook_size,
        )

    def _identity(self, spots: Spots, groups: NDArray[np.integer], sections: NDArray[Any] | None) -> dict[str, str]:
        """Identity of the training run, see :func:`identity`; empty without checkpoints."""
        options, model = self.options, self.model
        if options.checkpoint_dir is None and options.resume_from is None:
            return {}
        digests = Digests()
        for rows in np.array_split(np.arange(len(spots)), range(ROWS_AT_ONCE, len(spots), ROWS_AT_ONCE)):
            (expression,) = spots[rows]
            assert isinstance(expression, Tensor)
            digests.update("expression", expression)
        digests.update("gene panel", np.array(model.registry.get("genes", [])))
        digests.update("gene scales", groups)
        digests.update("sections", None if sections is None else np.asarray(sections))
        return identity(1, options, model.config, digests.result())
