"""Both stages as one PyTorch module: token losses, prior, and expression generated from histology."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from .condition import Histology
from .config import ModelConfig
from .decoding import Decoding, Generation, generate, pieces_of_spots
from .observation import Composition
from .precision import full_precision
from .prior import ConditionalMeanPrior, disagreement
from .var_stage import VARStage
from .vqvae import MultiScaleGeneVQVAE

if TYPE_CHECKING:
    import pandas as pd

Precision = Literal["fp32", "bf16"]


class TwoStageNetwork(nn.Module):
    """The two-stage model as a PyTorch module; :class:`histovar.model.TwoStageVARST` adds saving and loading.

    Parameters
    ----------
    config
        The model's configuration. Without ``embedding_dims`` there is no stage 2 yet; see :meth:`add_stage2`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.stage1 = MultiScaleGeneVQVAE(config)
        self.stage2: VARStage | None = VARStage(config) if config.embedding_dims else None
        self.registry: dict[str, Any] = {}
        self.history: dict[str, pd.DataFrame] = {}

    def add_stage2(self, config: ModelConfig) -> None:
        """Add an untrained stage 2 to a model with a trained stage 1.

        Parameters
        ----------
        config
            Configuration with ``embedding_dims``; its stage 1 must have the shape of that of ``self.config``.

        Raises
        ------
        ValueError
            If the shapes differ, or there are no ``embedding_dims``.
        """
        self.check_stage1(config)
        if not config.embedding_dims:
            raise ValueError("config: embedding_dims is empty; stage 2 needs the width of at least one embedding")
        self.config = self.stage1.config = config
        self.stage2 = VARStage(config).to(self.device)
        self.stage2.transformer.parents.copy_(self.stage1.scales.parents())

    def check_stage1(self, config: ModelConfig) -> None:
        """Refuse a configuration whose stage 1 has another shape than this model's.

        Parameters
        ----------
        config
            A configuration.

        Raises
        ------
        ValueError
            Naming the fields that differ.
        """
        fixed = ("n_genes", "scales", "components", "residual", "codebook_size", "codebook_dim", "encoder_hidden")
        differing = [name for name in fixed if getattr(config, name) != getattr(self.config, name)]
        if differing:
            raise ValueError(
                f"config: {differing} differ from the trained stage 1; train stage 1 again, or leave them as they are"
            )

    @property
    def device(self) -> torch.device:
        """Device that the model is on."""
        return self.stage1.scales.mean.device

    @property
    def var_stage(self) -> VARStage:
        """Stage 2, which must exist.

        Raises
        ------
        ValueError
            If the model has no stage 2 yet.
        """
        if self.stage2 is None:
            raise ValueError("model has no stage 2 yet; train it with histovar.tl.train_stage2")
        return self.stage2

    def in_precision(self, precision: Precision) -> Self:
        """The model with its transformer and token head in another precision, for generation.

        Parameters
        ----------
        precision
            ``"fp32"`` returns the model itself; ``"bf16"`` a model with a copy of stage 2 and everything else shared.
            Sums over codes stay in fp32.

        Returns
        -------
        TwoStageNetwork
        """
        if precision == "fp32":
            return self
        other = copy(self)
        other._modules = {**self._modules, "stage2": deepcopy(self.var_stage)}
        stage2 = other.var_stage
        for module in (stage2.transformer, stage2.head.embedding, stage2.head.output):
            module.to(torch.bfloat16)
        return other

    def set_training_stage(self, stage: Literal[1, 2]) -> None:
        """Make one stage trainable, and freeze the other (no gradients, evaluation mode).

        Parameters
        ----------
        stage
            1 or 2.

        Raises
        ------
        ValueError
            If `stage` is neither, or is 2 while there is no stage 2.
        """
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {stage!r}")
        if stage == 2:
            _ = self.var_stage
        for module, active in ((self.stage1, stage == 1), (self.stage2, stage == 2)):
            if module is not None:
                module.requires_grad_(active)
                module.train(active)

    def tokenize(self, expression: Tensor) -> Tensor:
        """Turn measured expression, (n_spots, n_genes) in layer units, into tokens, (n_spots, n_tokens)."""
        return self.stage1.tokenize(expression)

    def decode(self, tokens: Tensor) -> Tensor:
        """Turn tokens, (..., n_tokens), into expression, (..., n_genes) in layer units."""
        return self.stage1.decode(tokens)

    def reconstruct(self, expression: Tensor) -> Tensor:
        """Tokenise expression and decode it again, (n_spots, n_genes) in layer units."""
        return self.decode(self.tokenize(expression))

    def prior_mean(self, genes: Tensor) -> list[Tensor]:
        """Split the prior's standardised expression, (n_spots, n_genes), into group values of every scale."""
        scales = self.stage1.scales
        with full_precision(genes.device):
            return scales.split(genes.to(scales.mean.dtype))

    def token_loss(
        self,
        histology: Histology,
        tokens: Tensor,
        prior: Tensor | None = None,
        teacher: Tensor | None = None,
        genes: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of true tokens, each predicted from the tokens before it (teacher forcing).

        Parameters
        ----------
        histology
            Inputs of the spots, aligned.
        tokens
            (n_spots, n_tokens): the targets.
        prior
            (n_spots, n_genes): standardised conditional means; by default :meth:`conditional_mean`.
        teacher
            (n_spots, :attr:`ModelConfig.n_feeding`, width): embeddings to feed in place of those of `tokens`.
        genes
            Genes whose tokens to predict at a wide finest scale, increasing; all by default.

        Returns
        -------
        Tensor
            (n_spots, number of tokens predicted).
        """
        (loss,) = self._score_tokens((self.var_stage.head.loss,), histology, tokens, prior, teacher, genes)
        return loss

    def token_loss_and_rank(
        self, histology: Histology, tokens: Tensor, prior: Tensor | None = None, genes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and rank of true tokens in one pass; arguments and shapes as :meth:`token_loss`."""
        head = self.var_stage.head
        loss, rank = self._score_tokens((head.loss, head.rank), histology, tokens, prior, None, genes)
        return loss, rank

    def _score_tokens(
        self,
        scores: Sequence[Callable[[Tensor, int, slice | Tensor, Tensor | None, Tensor], Tensor]],
        histology: Histology,
        tokens: Tensor,
        prior: Tensor | None,
        teacher: Tensor | None,
        genes: Tensor | None,
    ) -> list[Tensor]:
        """Apply scores of the head (loss, rank) to the true tokens, in one pass through the transformer."""
        scales = self.config.scales
        n_coarse = sum(scales[:-1])
        positions = None
        if genes is not None:
            positions = torch.cat([torch.arange(n_coarse, device=genes.device), genes + n_coarse])
        shifts = self._shifts(histology, prior)
        chunks = []
        for spots in pieces_of_spots(len(tokens), self.var_stage.transformer):
            chunk_teacher = None if teacher is None else teacher[spots]
            hidden = self._hidden(histology.map(itemgetter(spots)), tokens[spots], chunk_teacher, positions)
            hidden_by_scale = hidden.split((*scales[:-1], hidden.shape[1] - n_coarse), 1)
            by_scale = []
            for k, (states, ids) in enumerate(zip(hidden_by_scale, tokens[spots].split(scales, 1), strict=True)):
                groups = slice(None) if genes is None or k < len(scales) - 1 else genes
                shift = None if shifts is None else shifts[k][spots][:, groups]
                by_scale.append([score(states, k, groups, shift, ids[:, groups]) for score in scores])
            chunks.append([torch.cat(columns, 1) for columns in zip(*by_scale, strict=True)])
        return [torch.cat(values) for values in zip(*chunks, strict=True)]

    def token_logits(self, histology: Histology, tokens: Tensor) -> Tensor:
        """Logits of all tokens, each given the tokens before it: (n_spots, n_tokens, codebook_size)."""
        hidden = self._hidden(histology, tokens)
        shifts = self._shifts(histology, None)
        logits = [
            self.var_stage.head.logits(states, k, slice(None), None if shifts is None else shifts[k])
            for k, states in enumerate(hidden.split(self.config.scales, 1))
        ]
        return torch.cat(logits, 1)

    def token_embeddings(self, tokens: Tensor) -> Tensor:
        """Embeddings of the tokens that are inputs of others: (n_spots, :attr:`ModelConfig.n_feeding`, width)."""
        return self.var_stage.head.embed(tokens[:, : self.config.n_feeding], self.stage1.quantizer.codebook)

    def _hidden(
        self, histology: Histology, tokens: Tensor, teacher: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Hidden states of the transformer, by default with the embeddings of `tokens` as inputs."""
        stage2 = self.var_stage
        if teacher is None:
            teacher = self.token_embeddings(tokens)
        hidden: Tensor = stage2.transformer(teacher, stage2.condition(histology), positions)
        return hidden

    @torch.no_grad()
    def expected_teacher(self, histology: Histology, prior: Tensor | None) -> Tensor:
        """Expected token embeddings given the prior alone, shaped as :meth:`token_embeddings`.

        Fed in place of the true tokens during training, they prepare the model for the inputs of expected decoding.
        """
        codebook = self.stage1.quantizer.codebook
        shifts = self._shifts(histology, prior)
        n_spots, n_feeding = len(histology.sources[0]), self.config.n_feeding
        embeddings = []
        for k, n in enumerate(self.config.scales):
            if sum(self.config.scales[:k]) < n_feeding:
                hidden = codebook.new_zeros(n_spots, n, self.config.width)
                shift = None if shifts is None else shifts[k]
                embedding = self.var_stage.head.expected(hidden, k, slice(None), shift).embedding
                assert embedding is not None
                embeddings.append(embedding)
        return torch.cat(embeddings, 1)[:, :n_feeding]

    def _shifts(self, histology: Histology, prior: Tensor | None) -> list[Tensor] | None:
        """Group values of the prior's mean for every scale, which shift the logits; None without a prior."""
        if self.var_stage.prior is None:
            return None
        return self.prior_mean(self.conditional_mean(histology) if prior is None else prior)

    def prior_members(self, histology: Histology, *, cross_fitted: bool = False) -> Tensor:
        """Prediction of each member of the prior: (n_members, n_spots, n_genes).

        Relative rates where the model learnt from counts (:attr:`VARStage.of_counts`), else standardised expression.

        Parameters
        ----------
        histology
            Inputs of the spots, aligned.
        cross_fitted
            Whether to predict with the cross-fitted members, each trained without some of the training spots, instead
            of those trained on all.

        Raises
        ------
        ValueError
            If the model has no prior.
        """
        members: Tensor = self._prior(self.var_stage.condition.features(histology), cross_fitted=cross_fitted)
        return members

    @property
    def _prior(self) -> ConditionalMeanPrior:
        """The prior, which must exist."""
        if self.var_stage.prior is None:
            raise ValueError("the model has no prior (n_members=0)")
        return self.var_stage.prior

    def lognorm(self, counts: Tensor, totals: Tensor) -> Tensor:
        """Log-normalise counts (n_spots, n_genes), given total counts (n_spots, 1), as the training data were."""
        return (counts * (self.var_stage.observation.target_sum / totals)).log1p()

    def standardized_means(self, expected: Tensor, log_depth: Tensor) -> Tensor:
        """Turn the prior's prediction, (..., n_spots, n_genes), into standardised expression at the expected depth."""
        observation = self.var_stage.observation
        if not self.var_stage.of_counts:
            return expected
        rates = (observation.base * expected).flatten(0, -2)
        log_depth = log_depth.expand(expected.shape[:-1]).flatten()
        return self.stage1.scales.standardize(observation.mean(rates, log_depth)).view_as(expected)

    def conditional_mean(self, histology: Histology) -> Tensor:
        """Standardised expression predicted by the prior, the mean over its members: (n_spots, n_genes)."""
        features = self.var_stage.condition.features(histology)
        return self.standardized_means(
            self._prior(features).mean(0), self._prior.log_depth(features, histology.novelty).mean(0)
        )

    @torch.no_grad()
    def composition(self, histology: Histology, members: Tensor, unseen: Tensor | None = None) -> Composition:
        """Predicted rates and depth with their uncertainty, for a model that learnt from counts.

        Parameters
        ----------
        histology
            Inputs of the spots, aligned.
        members
            (n, n_spots, n_genes) from :meth:`prior_members`.
        unseen
            (n_members,) True for the cross-fitted members that `members` are; None if they were trained on all spots.
        """
        observation = self.var_stage.observation
        features, novelty = self.var_stage.condition.features(histology), histology.novelty
        log_depths = self._prior.log_depth(features, novelty, cross_fitted=unseen is not None)
        log_depth = (log_depths if unseen is None else log_depths[unseen]).mean(0)
        rates = observation.base * members.mean(0)
        if unseen is not None or len(members) < 2:  # no more uncertain than training spots
            return Composition(rates, log_depth, torch.zeros_like(log_depth), torch.ones_like(log_depth))
        # An adapted model has measured how far its section is from those of training.
        novelty = histology.novelty if self.var_stage.adaptation is None else torch.zeros_like(histology.novelty)
        return observation.composed(rates, log_depth, disagreement(members), novelty)

    @torch.no_grad()
    def predict(
        self,
        histology: Histology,
        decoding: Decoding | None = None,
        *,
        n_samples: int = 1,
        members: Tensor | None = None,
        means: Tensor | None = None,
        tokens: bool = True,
        std: bool = True,
        generator: torch.Generator | None = None,
        keep_logits: bool = False,
    ) -> Generation:
        """Generate expression from histology, in the units of training.

        Expected decoding uses the mean of the prior's members, and adds the variance between them to that of the token
        distributions. Sampling uses one member, at random, for each draw.

        Parameters
        ----------
        histology
            Inputs of the spots, aligned (:meth:`ConditionProcessor.align`).
        decoding
            How tokens are chosen; expected decoding by default.
        n_samples
            Draws for each spot; the result has all draws of the first spot, then those of the second, and so on.
        members
            (n, n_spots, n_genes): predictions of the prior's members; by default :meth:`prior_members`.
        means
            (n_spots, n_genes): standardised conditional means; by default those of `members`.
        tokens, std
            Whether to return them. Expected decoding without either skips the transformer where the gates are shut.
        generator
            Source of randomness for sampling.
        keep_logits
            Return the logits of all tokens.

        Returns
        -------
        Generation
        """
        stage2 = self.var_stage
        decoding = decoding or Decoding()
        memory = stage2.condition(histology)
        if n_samples > 1:
            memory = memory.repeat_interleave(n_samples, 0)
        shifts = None
        if stage2.prior is not None:
            if members is None and means is None:
                members = self.prior_members(histology)
            if means is None:
                assert members is not None
                log_depth = stage2.prior.log_depth(stage2.condition.features(histology), histology.novelty).mean(0)
                if decoding.mode == "sample":
                    member_means = self.standardized_means(members, log_depth)
                    n_spots, device = member_means.shape[1], member_means.device
                    drawn = torch.randint(len(member_means), (n_spots, n_samples), generator=generator, device=device)
                    spots = torch.arange(n_spots, device=device)
                    shifts = self.prior_mean(member_means[drawn, spots[:, None]].flatten(0, 1))
                else:
                    means = self.standardized_means(members.mean(0), log_depth)
            if means is not None:
                shifts = self.prior_mean(means.repeat_interleave(n_samples, 0))
        generation = generate(
            self.stage1,
            stage2.transformer,
            stage2.head,
            memory,
            shifts,
            decoding,
            tokens=tokens,
            std=std,
            generator=generator,
            keep_logits=keep_logits,
        )
        adds_disagreement = decoding.mode == "expected" and not stage2.of_counts
        if generation.std is not None and adds_disagreement and members is not None and len(members) > 1:
            # Many times as fast as var, which goes through members spot by spot.
            variance = (members - members.mean(0)).square().sum(0) / (len(members) - 1)
            disagreement = (variance * self.stage1.scales.std.square()).repeat_interleave(n_samples, 0)
            generation = generation._replace(std=(generation.std.square() + disagreement).sqrt())
        return generation


def count_parameters(modules: Sequence[nn.Module]) -> int:
    """Count the parameters of modules, trainable and frozen, without buffers."""
    return sum(p.numel() for module in modules for p in module.parameters())
