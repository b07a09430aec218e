"""The card of a saved model, ``model.json``: its schema, validation, and conversion from earlier formats.

A card holds the configuration of the model, what it was trained on (registry and history) and the SHA-256 of its
weights. A card is refused unless every field is present, has the right type and is in range; nothing in it is used
before that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from histovar._version import __version__

from .config import ModelConfig

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "histovar"
FORMAT_VERSION = 9
CARD = "model.json"
# In bytes. A panel of 40,000 genes and 10,000 sections take about 2 MB.
LARGEST_CARD = 2**26

# Fields that a format version added to the configuration, and removed from it.
CONFIG_FIELDS_ADDED = {2: "standardize", 3: "attention_limit", 4: "outline"}
CONFIG_FIELDS_REMOVED = {5: "softening"}
# First format version whose cards have checksums.
CHECKSUMS_SINCE = 6

# Fields of the registry for each stage.
OF_STAGE1 = ("genes", "layer", "units", "library_key", "n_spots_stage1", "sections_stage1", "normalization")
OF_STAGE2 = (
    "use_rep",
    "embedding_dims",
    "spatial_key",
    "library_key",
    "covariates",
    "n_spots_stage2",
    "sections_stage2",
    "images",
    "group_key",
    "groups_stage2",
    "embeddings",
    "spacing_um",
)
# Fields that calibration and adaptation add.
AFTER_TRAINING = ("calibration", "trust", "adapted")
# The description by the people who trained the model.
DESCRIPTION = "description"
# Fields that models of earlier formats lack, also when they are saved again.
ADDED_TO_REGISTRY = ("normalization", "images", "group_key", "groups_stage2", "embeddings", "spacing_um")

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Number = Annotated[int, Field(ge=0, le=2**31 - 1)]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Key = Annotated[str, Field(pattern=r"^[^\x00]+$")]
Rate = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Correlation = Annotated[float, Field(ge=-1, le=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Stage = Literal[1, 2]


class _Fields(BaseModel):
    """Strict schema: no missing or unknown fields, no conversion of types, only finite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ConfigCard(_Fields):
    """Types and ranges of :class:`ModelConfig`, which itself checks whether its values are consistent."""

    n_genes: Count
    scales: list[Count]
    components: list[Count]
    residual: bool
    # All pairs of codes are compared: a larger codebook would take longer than any training.
    codebook_size: Annotated[int, Field(ge=1, le=2**16)]
    codebook_dim: Count
    codebook_update: Literal["ema", "gradient"]
    codebook_decay: Annotated[float, Field(gt=0, lt=1)]
    dead_code_threshold: Weight
    encoder_hidden: list[Count]
    hierarchical_weight: Weight
    vq_weight: Weight
    commitment_weight: Weight
    embedding_dims: list[Count]
    n_neighbors: list[Annotated[int, Field(ge=1, le=100_000)]]
    outline: bool
    coordinates: bool
    n_covariates: Number
    condition: Literal["pca", "mlp"]
    standardize: Literal["auto", "section", "training"]
    n_pcs: Count
    width: Count
    n_layers: Count
    n_heads: Count
    feedforward: Count
    dropout: Rate
    order: Literal["scale", "token"]
    attention_limit: Number
    style: Literal["modern", "reference"]
    n_members: Number
    prior_hidden: Count
    prior_dropout: Rate
    prior_input_dropout: Rate


class NormalizationCard(_Fields):
    """Normalisation of the expression trained on; an unknown `target_sum` is null."""

    kind: Literal["log1p", "counts", "values"]
    target_sum: float | None
    n_genes: Count
    panel_low: float
    panel_median: float
    panel_high: float
    panel_only: bool
    logarithms: bool


class NumericCovariate(_Fields):
    """A numeric covariate, with the mean and standard deviation that standardise it."""

    mean: float
    std: Annotated[float, Field(gt=0)]


class CategoricalCovariate(_Fields):
    """A categorical covariate, with its categories."""

    categories: Annotated[list[Text], Field(min_length=1)]


class EmbeddingCard(_Fields):
    """How an embedding that was trained on was made, as recorded by :func:`histovar.pp.embed`.

    Fields that earlier versions did not record are null.
    """

    encoder: Key
    layers: Annotated[str, Field(pattern=r"^(\d+(,\d+)*)?$")]
    pooling: Key
    input_px: Count
    field_um: Annotated[float, Field(gt=0)]
    mpp: Annotated[float, Field(gt=0)] | None
    weights: Key | None = None
    mean: Key | None = None
    std: Key | None = None
    precision: Key | None = None


class CalibrationCard(_Fields):
    """The spots that intervals were calibrated on."""

    sections: list[Text]
    n_spots: Count
    groups: list[Text] = []


class TrustCard(_Fields):
    """Accuracy of each gene on spots that the prediction had not seen; null where it is undefined."""

    of: Literal["section", "individual", "same section"]
    groups: Annotated[list[Text], Field(min_length=1)]
    n_spots: list[Count]
    pearson: list[list[Correlation | None]]
    variance: list[Annotated[float, Field(gt=0)]]
    p_value: list[Annotated[float, Field(ge=0, le=1)] | None]
    ceiling: list[Annotated[float, Field(ge=0, le=1)] | None]

    @model_validator(mode="after")
    def _is_table(self) -> TrustCard:
        """Check that all fields have the same groups and genes."""
        n_genes = len(self.variance)
        if len(self.n_spots) != len(self.groups) or len(self.pearson) != len(self.groups):
            raise ValueError(f"n_spots and pearson must have one entry for each of {len(self.groups)} groups")
        if any(len(row) != n_genes for row in (*self.pearson, self.p_value, self.ceiling)):
            raise ValueError(f"pearson, p_value and ceiling must have one entry for each of {n_genes} genes")
        return self


class AdaptedCard(_Fields):
    """The section that a model was adapted to, empty if it has no name, and its number of measured spots."""

    section: Text
    n_spots: Count


class DescriptionCard(_Fields):
    """Description by the people who trained a model: null where removed, left out where never given."""

    tissue: Key | None = None
    species: Key | None = None
    licence: Key | None = None


class RegistryCard(_Fields):
    """What each stage was trained on: all fields of a stage, or none if it was trained without AnnData."""

    genes: list[Text] = []
    layer: Key = "-"
    units: Text = ""
    library_key: Text | None = None
    n_spots_stage1: Count = 1
    sections_stage1: list[Text] = []
    normalization: NormalizationCard | None = None
    use_rep: list[Key] = []
    embedding_dims: list[Count] = []
    spatial_key: Key = "-"
    covariates: dict[Text, NumericCovariate | CategoricalCovariate] = {}
    n_spots_stage2: Count = 1
    sections_stage2: list[Text] = []
    images: dict[Text, dict[Text, float]] = {}
    group_key: Key | None = None
    groups_stage2: list[Text] = []
    embeddings: list[EmbeddingCard | None] = []
    spacing_um: Annotated[float, Field(gt=0)] | None = None
    calibration: CalibrationCard | None = None
    trust: TrustCard | None = None
    adapted: AdaptedCard | None = None
    description: DescriptionCard | None = None

    @property
    def covariate_width(self) -> int:
        """Number of columns of the encoded covariates."""
        return sum(len(c.categories) if isinstance(c, CategoricalCovariate) else 1 for c in self.covariates.values())


class HistoryCard(_Fields):
    """Training history as a table, one row for each epoch."""

    columns: list[Text]
    index: list[int]
    data: list[list[float | None]]

    @model_validator(mode="after")
    def _is_table(self) -> HistoryCard:
        """Check that rows and columns match the data."""
        if len(self.data) != len(self.index) or any(len(row) != len(self.columns) for row in self.data):
            raise ValueError(f"data is not a table of {len(self.index)} rows and {len(self.columns)} columns")
        return self


class ModelCard(_Fields):
    """A card in the present format, or one in an earlier format that :func:`_upgrade` has completed."""

    format: Literal["histovar"]
    format_version: Count
    version: Text
    stages: list[Stage]
    registered: list[Stage] | None = None
    stage1_fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    config: ConfigCard
    registry: RegistryCard
    history: dict[Text, HistoryCard] = {}
    weights: dict[str, Digest] | None = None
    sha256: Digest | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> ModelCard:
        """Check that the fields are those of the format version, and match each other."""
        is_checked = self.format_version >= CHECKSUMS_SINCE
        for name in ("registered", "weights", "sha256"):
            if (getattr(self, name) is None) == is_checked:
                raise ValueError(f"{name}: " + ("missing" if is_checked else f"not in format {self.format_version}"))
        for name in ("stage1_fingerprint", "history"):
            if is_checked and (name not in self.model_fields_set or getattr(self, name) is None):
                raise ValueError(f"{name}: missing")
        if not self.stages or self.stages != sorted(set(self.stages)):
            raise ValueError(f"stages: must be [1], [2] or [1, 2], got {self.stages}")
        files = [weights_name(stage) for stage in self.stages]
        if self.weights is not None and sorted(self.weights) != files:
            raise ValueError(f"weights: must name {files}, got {sorted(self.weights)}")
        self._check_registry()
        return self

    def _check_registry(self) -> None:
        """Check the registry against the stages and the configuration."""
        registry, config = self.registry, self.config
        # Formats without checksums were always written by training.
        registered = [*self.stages] if self.registered is None else self.registered
        for stage, names in ((1, OF_STAGE1), (2, OF_STAGE2)):
            present = [name for name in names if name in registry.model_fields_set and name != "library_key"]
            if stage in registered:
                missing = [n for n in names if n not in registry.model_fields_set and n not in ADDED_TO_REGISTRY]
                if missing:
                    raise ValueError(f"registry.{missing[0]}: missing")
            elif present and self.registered is not None:
                raise ValueError(f"registered: does not have stage {stage}, but the registry has {present[0]}")
        if 1 in registered:
            if len(registry.genes) != config.n_genes:
                n_genes = len(registry.genes)
                raise ValueError(f"registry.genes: must have config.n_genes={config.n_genes} genes, got {n_genes}")
            if len(set(registry.genes)) != len(registry.genes):
                raise ValueError("registry.genes: a gene is listed twice")
        if registry.trust is not None and len(registry.trust.variance) != config.n_genes:
            n_genes = len(registry.trust.variance)
            raise ValueError(f"registry.trust: must have config.n_genes={config.n_genes} genes, got {n_genes}")
        if 2 in self.stages and not config.embedding_dims:
            raise ValueError("config.embedding_dims: must not be empty, as there is a stage 2")
        if 2 in self.stages and 2 in registered:
            if registry.embedding_dims != config.embedding_dims:
                raise ValueError(
                    f"registry.embedding_dims: must be config.embedding_dims={config.embedding_dims}, got "
                    f"{registry.embedding_dims}"
                )
            if registry.covariate_width != config.n_covariates:
                raise ValueError(
                    f"registry.covariates: must encode to config.n_covariates={config.n_covariates} columns, got "
                    f"{registry.covariate_width}"
                )
        if len(registry.use_rep) != len(registry.embedding_dims):
            raise ValueError(
                f"registry.use_rep: must have as many entries as embedding_dims, {len(registry.embedding_dims)}, got "
                f"{len(registry.use_rep)}"
            )
        if registry.embeddings and len(registry.embeddings) != len(registry.use_rep):
            raise ValueError(
                f"registry.embeddings: must have as many entries as use_rep, {len(registry.use_rep)}, got "
                f"{len(registry.embeddings)}"
            )


def weights_name(stage: int) -> str:
    """Name of the file with the weights of a stage."""
    return f"stage{stage}.safetensors"


def make_card(
    *,
    config: ModelConfig,
    registry: Mapping[str, Any],
    history: Mapping[str, pd.DataFrame],
    stage1_fingerprint: str,
    weights: Mapping[int, str],
) -> dict[str, Any]:
    """Make the card of a model, in the present format.

    Parameters
    ----------
    config, registry, history
        Configuration, registry and training history of the model.
    stage1_fingerprint
        Fingerprint of the model's stage 1, with which its stage 2 was trained.
    weights
        SHA-256 of the weights file of each saved stage.

    Raises
    ------
    ValueError
        If the registry or the history does not fit the schema of a card; the message names the field.
    """
    registry = dict(registry)
    normalization = registry.get("normalization")
    if isinstance(normalization, Mapping) and not _is_finite(normalization.get("target_sum")):
        registry["normalization"] = {**normalization, "target_sum": None}
    card = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "stages": sorted(weights),
        "registered": [stage for stage, name in ((1, "genes"), (2, "use_rep")) if name in registry],
        "stage1_fingerprint": stage1_fingerprint,
        "config": json.loads(config.to_json()),
        "registry": registry,
        "history": {name: json.loads(table.to_json(orient="split")) for name, table in history.items()},
        "weights": {weights_name(stage): digest for stage, digest in weights.items()},
    }
    try:
        card = json.loads(json.dumps(card, default=_plain))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"model: its registry holds what JSON cannot store ({error}); keep only plain types there"
        ) from None
    card["sha256"] = content_digest(card)
    _check(card, "model: cannot be saved, as its card would be invalid: ")
    return card


def card_text(card: Mapping[str, Any]) -> str:
    """Format a card as JSON text."""
    return json.dumps(card, indent=2, allow_nan=False)


def content_digest(card: Mapping[str, Any]) -> str:
    """SHA-256 of the content of a card, apart from its own ``sha256``, white space and the order of fields."""
    content = {name: value for name, value in card.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_card(path: Path) -> dict[str, Any]:
    """Read and validate the card of a saved model.

    Cards of earlier formats are completed with the fields that the present format has.

    Parameters
    ----------
    path
        Directory of the model.

    Returns
    -------
    dict
        The card's fields, among them ``"config"``, ``"registry"`` and ``"stages"``.

    Raises
    ------
    FileNotFoundError
        If the directory or its card is missing.
    ValueError
        If the card is not histovar's, has a newer format or was changed after it was saved, or if a field is missing,
        unknown, of the wrong type or out of range; the message names the field.
    """
    if not path.is_dir():
        raise FileNotFoundError(
            f"path: no model directory at {str(path)!r}; model.save(...) or histovar train --out writes one"
        )
    file = path / CARD
    if not file.is_file():
        raise FileNotFoundError(f"path: {str(path)!r} is not a saved model, it has no {CARD}")
    where = f"path: {str(file)!r}"
    if file.stat().st_size > LARGEST_CARD:
        raise ValueError(f"{where} has {file.stat().st_size:,} bytes; a card has {LARGEST_CARD:,} at most")
    try:
        card = json.loads(file.read_bytes(), object_pairs_hook=_refuse_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is truncated or not JSON ({error}); save the model again") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError(f"{where} does not describe a histovar model")
    version = card.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{where}: format_version must be a number from 1 to {FORMAT_VERSION}, got {_short(version)}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"path: {str(path)!r} has format {_short(version)}, written by histovar {_short(card.get('version'))}; "
            f"this version reads up to {FORMAT_VERSION}: upgrade histovar"
        )
    digest = content_digest(card) if version >= CHECKSUMS_SINCE else None
    _upgrade(card, version, where)
    _check(card, f"{where}: ")
    if digest is not None and card["sha256"] != digest:
        raise ValueError(f"{where} was changed after it was saved (its SHA-256 differs); save the model again")
    normalization = card["registry"].get("normalization")
    if normalization is not None and normalization["target_sum"] is None:
        normalization["target_sum"] = math.nan
    return card


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of JSON fields, each of which may occur once only."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_short(next(n for n in names if names.count(n) > 1))} occurs twice")
    return fields


def _upgrade(card: dict[str, Any], version: int, where: str) -> None:
    """Complete a card of an earlier format in place, so that it has the fields of the present one."""
    config, registry = card.get("config"), card.get("registry")
    if not isinstance(config, dict):
        return
    since = {name: number for number, name in CONFIG_FIELDS_ADDED.items()}
    too_new = [name for name in config if since.get(name, 0) > version]
    if too_new:
        raise ValueError(f"{where}: config.{too_new[0]} is not a field of format {version}")
    if version < 2:
        # Formats before 2 standardised by the training statistics, as part of the projection.
        config["standardize"] = "training"
    if version < 3 and "n_genes" in config:
        # Formats before 3 had no limit: every scale attended to itself.
        config["attention_limit"] = config["n_genes"]
    if version < 4:
        config["outline"] = False
    for number, name in CONFIG_FIELDS_REMOVED.items():
        # Formats before 5 had an option to soften targets, which only concerned training.
        if version < number:
            if not _is_finite(config.pop(name, None)):
                raise ValueError(f"{where}: config.{name} must be a finite number")
    if version < CHECKSUMS_SINCE and isinstance(registry, dict):
        normalization = registry.get("normalization")
        if isinstance(normalization, dict):
            target = normalization.get("target_sum")
            if isinstance(target, float) and math.isnan(target):
                normalization["target_sum"] = None


def _check(card: dict[str, Any], where: str) -> None:
    """Refuse a card that is not a valid :class:`ModelCard`, or whose configuration is inconsistent."""
    try:
        ModelCard.model_validate(card)
        ModelConfig.from_json(json.dumps(card["config"]))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(_short(key).strip("'") for key in first["loc"])
        message = first["msg"].removeprefix("Value error, ").split(" or instance of ")[0]
        if field:
            value = f", got {_short(first['input'])}" if first["type"] not in ("missing", "value_error") else ""
            message = f"{field}: {message[:1].lower()}{message[1:]}{value}"
        raise ValueError(where + message) from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}config: {str(error).removeprefix('ModelConfig: ')}") from None


def _short(value: Any) -> str:
    """Format a value for an error message, in one line and not too long."""
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 64 else f"{text[:60]}..."


def _is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return is_number and abs(value) < math.inf


def _plain(value: Any) -> Any:
    """Convert NumPy scalars to Python numbers for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} {_short(value)}")
