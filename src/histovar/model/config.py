"""Configuration of a model: its scales, widths, loss weights and options."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from histovar._arguments import Count, Increasing, ListOf, NotNegative, Number, Rate, TupleOf, check_arguments, checked

# Numbers of the outline for each neighbourhood: how far away the neighbours are, and how one-sided they lie.
N_OUTLINE = 2


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a model: its shape and the weights of its losses.

    Build one with :meth:`default` or :meth:`reference`; change one with :meth:`replace`.

    Parameters
    ----------
    n_genes
        Number of genes of the panel, G.
    scales
        Number of gene groups at each scale, coarse to fine; strictly increasing, the last is `n_genes`.
        A spot has ``sum(scales)`` tokens.
    components
        Number of values that summarise one group at each scale; the last is 1, the expression of the gene itself.
    residual
        Whether each scale encodes the residual of the coarser scales (default) or, as in the reference, the
        plain average of its groups.
    codebook_size, codebook_dim
        Number of codes, shared by all scales, and width of their vectors.
    codebook_update
        ``"ema"``: k-means start, exponential moving averages and revival of dead codes.
        ``"gradient"``: the codebook is a parameter, trained by the codebook loss.
    codebook_decay
        Decay of the moving averages.
    dead_code_threshold
        A code with a smaller moving average of hits per update is replaced by a random latent.
    encoder_hidden
        Hidden width of the encoder and the decoder of each scale.
    hierarchical_weight, vq_weight, commitment_weight
        Loss of stage 1 = reconstruction + `hierarchical_weight` x (loss of each scale) + `vq_weight` x
        (codebook + `commitment_weight` x commitment).
    embedding_dims
        Width of each histology embedding (one for each key of ``use_rep``). Empty: there is no stage 2 yet.
    n_neighbors
        Sizes, in spots, of the nested neighbourhoods whose mean embeddings are part of the condition (the niche). A
        section needs more spots than the smallest; larger ones are limited to a quarter of their section.
    outline
        Whether the niche also says how near a spot is to the section's outline: how far away its neighbours are, and
        how one-sided they lie.
    coordinates
        Whether a spot's coordinates, scaled to its section, are part of the condition.
    n_covariates
        Number of columns of encoded ``obs`` covariates in the condition.
    condition
        ``"pca"``: each source is standardised and projected onto its leading principal components over the
        training spots. ``"mlp"``: the reference's two-layer network.
    standardize
        Statistics by which ``condition="pca"`` standardises embeddings. ``"section"``: mean and standard deviation of
        the section itself, which removes effects of stain and scanner. ``"training"``: those of the training data,
        which keeps what distinguishes a section's tissue. ``"auto"``: some members of the prior use one and some the
        other; with three neighbourhoods two thirds use the section's, with fewer half.
    n_pcs
        Number of principal components of each source.
    width, n_layers, n_heads, feedforward, dropout
        Transformer: model width, decoder layers, attention heads, hidden width of the feed-forward layers,
        dropout rate.
    order
        ``"scale"``: all tokens of a scale at once, given every coarser scale.
        ``"token"``: one token after another.
    attention_limit
        With ``order="scale"``, tokens of scales with more groups than this attend to coarser scales and the condition,
        but not to each other, so that cost grows linearly with genes. Those of the coarsest scale always do.
    style
        ``"modern"``: pre-norm, GELU, learned positions, token embedding and head tied to the codebook.
        ``"reference"``: post-norm, ReLU, sine-cosine positions, free token embedding and head.
    n_members
        Number of members of the conditional-mean prior, an ensemble whose mean prediction shifts the token logits: at
        least 2, or 0 for no prior. As many again are cross-fitted, to predict the training spots.
    prior_hidden, prior_dropout, prior_input_dropout
        Width of the prior's two hidden layers, and dropout rates of hidden layers and input.

    Raises
    ------
    TypeError
        If a value has the wrong type; the message names the field.
    ValueError
        If a value is out of range, or values contradict each other.
    """

    n_genes: Count
    scales: Annotated[Increasing, Field(min_length=1)]
    components: TupleOf[Count]
    residual: bool = True
    codebook_size: Count = 4096
    codebook_dim: Count = 128
    codebook_update: Literal["ema", "gradient"] = "ema"
    codebook_decay: Annotated[Rate, Field(gt=0)] = 0.95
    dead_code_threshold: NotNegative = 0.05
    encoder_hidden: TupleOf[Count] = (64, 64, 96, 256)
    hierarchical_weight: NotNegative = 0.1
    vq_weight: NotNegative = 0.25
    commitment_weight: NotNegative = 0.25
    embedding_dims: TupleOf[Count] = ()
    n_neighbors: Increasing = (8, 24, 48)
    outline: bool = True
    coordinates: bool = False
    n_covariates: Number = 0
    condition: Literal["pca", "mlp"] = "pca"
    standardize: Literal["auto", "section", "training"] = "auto"
    n_pcs: Count = 64
    width: Count = 96
    n_layers: Count = 2
    n_heads: Count = 4
    feedforward: Count = 384
    dropout: Rate = 0.3
    order: Literal["scale", "token"] = "scale"
    attention_limit: Number = 64
    style: Literal["modern", "reference"] = "modern"
    n_members: Number = 9
    prior_hidden: Count = 256
    prior_dropout: Rate = 0.5
    prior_input_dropout: Rate = 0.2

    def __post_init__(self) -> None:
        for name, value in checked(type(self), vars(self)).items():
            object.__setattr__(self, name, value)
        problems = list(self._problems())
        if problems:
            raise ValueError("ModelConfig: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        """Describe what in the configuration contradicts itself."""
        problems: list[str] = []

        def require(condition: bool, message: str) -> None:
            if not condition:
                problems.append(message)

        scales = self.scales
        require(scales[-1:] == (self.n_genes,), f"the last of scales must be n_genes={self.n_genes}, got {scales}")
        for name in ("components", "encoder_hidden"):
            values = getattr(self, name)
            require(len(values) == len(scales), f"{name} needs one number a scale ({len(scales)}), got {values}")
        require(self.components[-1:] == (1,), f"the last of components must be 1, got {self.components}")
        require(
            self.residual or set(self.components) <= {1},
            f"residual=False: components must be 1 at all scales, got {self.components}",
        )
        require(self.n_members != 1, "n_members=1 cannot be cross-fitted; use 0 for no prior, or at least 2")
        require(self.width % self.n_heads == 0, f"width={self.width} must be divisible by n_heads={self.n_heads}")
        if self.condition == "mlp":
            expected = self.condition_hidden + self.coordinate_dim * self.coordinates
            require(len(self.embedding_dims) <= 1, "condition='mlp' takes one embedding")
            require(not self.n_neighbors and not self.n_covariates, "condition='mlp' takes no niche and no covariates")
            require(self.width == expected, f"condition='mlp' needs width={expected}, got {self.width}")
            require(self.n_members == 0, "the prior needs condition='pca'")
        return problems

    # Widths of the reference's condition network, which no other configuration uses.
    condition_hidden = 512
    coordinate_hidden = 64
    coordinate_dim = 128

    @property
    def n_tokens(self) -> int:
        """Number of tokens of one spot."""
        return sum(self.scales)

    @property
    def n_feeding(self) -> int:
        """Number of leading tokens that are inputs of others (with ``order="scale"``, all but the finest scale's)."""
        return self.n_tokens - (self.scales[-1] if self.order == "scale" else 1)

    def is_wide(self, scale: int) -> bool:
        """Whether the tokens of a scale do not attend to each other."""
        return self.order == "scale" and 0 < scale and self.scales[scale] > self.attention_limit

    @property
    def has_outline(self) -> bool:
        """Whether the last source is the outline."""
        return self.outline and bool(self.n_neighbors)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics by which sources are standardised, ``"section"``, ``"training"`` or both, one copy by each."""
        return ("section", "training") if self.standardize == "auto" else (self.standardize,)

    @property
    def source_dims(self) -> tuple[int, ...]:
        """Width of every source (each embedding, its mean over each neighbourhood, the outline)."""
        embeddings = [dim for dim in self.embedding_dims for _ in range(1 + len(self.n_neighbors))]
        return (*embeddings, *self._outline_dims)

    @property
    def projected_dims(self) -> tuple[int, ...]:
        """Width of every source after alignment by one of :attr:`statistics`."""
        n_embeddings = len(self.embedding_dims) * (1 + len(self.n_neighbors))
        return (*[self.n_pcs] * n_embeddings, *self._outline_dims)

    @property
    def aligned_dims(self) -> tuple[int, ...]:
        """Width of every source after alignment, for all :attr:`statistics` one after another."""
        return self.projected_dims * len(self.statistics)

    @property
    def _outline_dims(self) -> tuple[int, ...]:
        """Width of the outline, if it is a source."""
        return (N_OUTLINE * len(self.n_neighbors),) if self.has_outline else ()

    @classmethod
    @check_arguments
    def default(cls, n_genes: Count, embedding_dim: Count | ListOf[Count] = (), **changes: Any) -> ModelConfig:
        """Default configuration, small enough to train on a laptop's CPU.

        Parameters
        ----------
        n_genes
            Number of genes of the panel.
        embedding_dim
            Width of the histology embedding, or of each of several.
        **changes
            Values of any other field.

        Returns
        -------
        ModelConfig
        """
        dims = (embedding_dim,) if isinstance(embedding_dim, int) else tuple(embedding_dim)
        coarse = [(n, c, h) for n, c, h in ((1, 4, 64), (8, 2, 64), (32, 1, 96)) if n < n_genes]
        scales, components, hidden = zip(*coarse, (n_genes, 1, 256), strict=True)
        values = {"scales": scales, "components": components, "encoder_hidden": hidden, "embedding_dims": dims}
        return cls(n_genes=n_genes, **{**values, **changes})

    @classmethod
    def reference(cls, **changes: Any) -> ModelConfig:
        """Configuration of the reference system: 85,484,996 parameters for 200 genes and a 1,024-d embedding.

        Parameters
        ----------
        **changes
            Fields to change, for instance to make it small enough to train on a laptop.

        Returns
        -------
        ModelConfig
        """
        values: dict[str, Any] = {
            "n_genes": 200,
            "scales": (1, 8, 32, 200),
            "components": (1, 1, 1, 1),
            "residual": False,
            "codebook_update": "gradient",
            "encoder_hidden": (64, 64, 96, 256),
            "embedding_dims": (1024,),
            "n_neighbors": (),
            "coordinates": True,
            "condition": "mlp",
            "width": 640,
            "n_layers": 12,
            "n_heads": 8,
            "feedforward": 2560,
            "dropout": 0.1,
            "order": "token",
            "style": "reference",
            "n_members": 0,
        }
        return cls(**{**values, **changes})

    def replace(self, **changes: Any) -> ModelConfig:
        """Copy the configuration with some fields changed, and validate it."""
        unknown = sorted(set(changes) - {f.name for f in fields(self)})
        if unknown:
            raise TypeError(f"ModelConfig: unknown fields {unknown}; known fields are {[f.name for f in fields(self)]}")
        return replace(self, **changes)

    def to_json(self) -> str:
        """Write the configuration as JSON text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Read a configuration from the JSON text that :meth:`to_json` wrote.

        Raises
        ------
        ValueError
            If the text is not JSON, or has unknown fields or wrong values.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"ModelConfig: not valid JSON ({error})") from None
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known) if isinstance(values, dict) else ["not a JSON object"]
        if unknown:
            raise ValueError(f"ModelConfig: unknown fields {unknown}; known fields are {sorted(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"ModelConfig: {error}") from None
