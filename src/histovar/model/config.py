"""The one description of a model: every width, scale, weight and switch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from histovar._arguments import Count, Increasing, ListOf, NotNegative, Number, Rate, TupleOf, check_arguments, checked

# What the outline says of a spot for each neighbourhood: how far its neighbours lie, and how lopsidedly.
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
        Number of values that summarise one group at each scale; the last is 1, the gene itself.
    residual
        Encode at each scale what the coarser scales left over (default), or, as in the reference, the
        plain average of every scale.
    codebook_size, codebook_dim
        Number of codes, shared by all scales, and their width.
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
        Sizes of the nested neighbourhoods whose mean embeddings join the condition (the niche). A section needs more
        spots than the smallest; one is at most a quarter of its section.
    outline
        Whether the niche tells, too, how near the section's outline a spot lies: how far its neighbours are, and how
        lopsidedly.
    coordinates
        Whether a spot's coordinates, scaled to its section, join the condition.
    n_covariates
        Number of encoded ``obs`` covariates that join the condition.
    condition
        ``"pca"``: each source is standardised and projected onto its leading principal components over the
        training spots. ``"mlp"``: the reference's two-layer network.
    standardize
        Of ``condition="pca"``: ``"section"`` standardises by the section's own mean and standard deviation, which takes
        stain and scanner out; ``"training"`` by those of training, which keeps what sets a section's tissue apart;
        ``"auto"`` does not bet on either: of three neighbourhoods, two thirds of the prior's members take the section's
        own, a third training's; of fewer, half of them.
    n_pcs
        Principal components kept of each source.
    width, n_layers, n_heads, feedforward, dropout
        Transformer: model width, decoder layers, attention heads, hidden width of the feed-forward layers,
        dropout rate.
    order
        ``"scale"``: all tokens of a scale at once, given every coarser scale.
        ``"token"``: one token after another.
    attention_limit
        With ``order="scale"``, scales of more groups than this attend to coarser scales and the condition, not to
        themselves, for cost to grow linearly with genes. The coarsest scale always attends to itself.
    style
        ``"modern"``: pre-norm, GELU, learned positions, token embedding and head tied to the codebook.
        ``"reference"``: post-norm, ReLU, sine-cosine positions, free token embedding and head.
    n_members
        Members of the conditional-mean head whose mean prediction shifts the token logits: at least 2, or 0 for none.
        As many again are cross-fitted, to predict the training spots.
    prior_hidden, prior_dropout, prior_input_dropout
        Width of its two hidden layers and its dropout rates.

    Raises
    ------
    TypeError
        If a value is of another type; the message names the field.
    ValueError
        If one is out of range, or values do not fit together.
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
        found: list[str] = []

        def require(condition: bool, message: str) -> None:
            if not condition:
                found.append(message)

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
        return found

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
        """Number of leading tokens that are inputs of others; with ``order="scale"``, all but the finest scale's."""
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
        """Statistics by which sources are standardised, once by each (``"section"``, ``"training"``)."""
        return ("section", "training") if self.standardize == "auto" else (self.standardize,)

    @property
    def source_dims(self) -> tuple[int, ...]:
        """Width of every source of the condition (each embedding, its mean over each neighbourhood, the outline)."""
        embeddings = [dim for dim in self.embedding_dims for _ in range(1 + len(self.n_neighbors))]
        return (*embeddings, *self._outline_dims)

    @property
    def projected_dims(self) -> tuple[int, ...]:
        """Width of every source once it is aligned, by one of :attr:`statistics`."""
        n_embeddings = len(self.embedding_dims) * (1 + len(self.n_neighbors))
        return (*[self.n_pcs] * n_embeddings, *self._outline_dims)

    @property
    def aligned_dims(self) -> tuple[int, ...]:
        """Width of every source once it is aligned, by each of :attr:`statistics`."""
        return self.projected_dims * len(self.statistics)

    @property
    def _outline_dims(self) -> tuple[int, ...]:
        return (N_OUTLINE * len(self.n_neighbors),) if self.has_outline else ()

    @classmethod
    @check_arguments
    def default(cls, n_genes: Count, embedding_dim: Count | ListOf[Count] = (), **changes: Any) -> ModelConfig:
        """The small configuration, made to train on a laptop's CPU.

        Parameters
        ----------
        n_genes
            Number of genes of the panel.
        embedding_dim
            Width of the histology embedding, or of each of several.
        **changes
            Any other field.

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
        """The reference system, layer for layer: 85,484,996 parameters for 200 genes and a 1,024-d embedding.

        Parameters
        ----------
        **changes
            Fields to change, for instance to cut it to a size that trains on a laptop.

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
        """A copy with some fields changed, validated again."""
        unknown = sorted(set(changes) - {f.name for f in fields(self)})
        if unknown:
            raise TypeError(f"ModelConfig: unknown fields {unknown}; known fields are {[f.name for f in fields(self)]}")
        return replace(self, **changes)

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The configuration that :meth:`to_json` wrote.

        Raises
        ------
        ValueError
            If the text is not JSON, or has fields that this version does not know.
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
