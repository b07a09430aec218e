"""Names of all slots of AnnData that histovar reads or writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from ._arguments import refuse_value

DEFAULT_KEY = "histovar"
LOGNORM = "lognorm"
LOGNORM_UNITS = "log1p(counts per 10,000)"
TARGET_SUM = 1e4
RESERVED = ("X", "spatial", LOGNORM)


def _prefix(value: str) -> str:
    if not re.fullmatch(r"\w(?:[^/\\\x00-\x1f]*[^/\\\x00-\x1f\s])?", value):
        refuse_value(
            "a name for slots that begins with a letter or digit, without '/' and backslashes, such as 'histovar'"
        )
    if value in RESERVED:
        refuse_value("a name for slots that other data do not use, such as 'histovar'")
    return value


# Type of the `key_added` of public functions.
Prefix = Annotated[str, AfterValidator(_prefix)]


@dataclass(frozen=True)
class Keys:
    """Slot names that share a prefix: the `key_added` of the public functions."""

    prefix: str = DEFAULT_KEY

    @property
    def uns(self) -> str:
        """``uns``: parameters, panel, units, version, evaluation."""
        return self.prefix

    @property
    def panel(self) -> str:
        """``var``: panel membership."""
        return f"{self.prefix}_panel"

    @property
    def scales(self) -> str:
        """``varm``: group of each gene at each scale."""
        return f"{self.prefix}_scales"

    @property
    def niche(self) -> str:
        """``obsm``: mean embeddings of the neighbourhoods."""
        return f"{self.prefix}_niche"

    @property
    def niche_source(self) -> str:
        """``obsm``: fingerprint of the embeddings and neighbours from which each spot's niche was computed."""
        return f"{self.prefix}_niche_source"

    @property
    def source(self) -> str:
        """``obsm``: fingerprint of the embeddings from which each spot was predicted."""
        return f"{self.prefix}_source"

    @property
    def gene(self) -> str:
        """``var``: gene of each column of the predicted layers."""
        return f"{self.prefix}_gene"

    @property
    def tokens(self) -> str:
        """``obsm``: gene tokens."""
        return f"{self.prefix}_tokens"

    @property
    def mean(self) -> str:
        """``layers`` or ``obsm``: expected expression."""
        return self.prefix

    @property
    def std(self) -> str:
        """``layers`` or ``obsm``: standard deviation of expression."""
        return f"{self.prefix}_std"

    @property
    def samples(self) -> str:
        """``obsm``: samples (joint draws) of expression."""
        return f"{self.prefix}_samples"

    @property
    def quantiles(self) -> str:
        """``obsm``: quantiles of expression."""
        return f"{self.prefix}_quantiles"

    @property
    def rates(self) -> str:
        """``obsm``: composition, in counts per 10,000."""
        return f"{self.prefix}_rates"

    @property
    def spots(self) -> str:
        """``obsm``: predicted total count of each spot, its uncertainty, and novelty."""
        return f"{self.prefix}_spots"

    def score(self, name: str) -> str:
        """``var``: a score of each gene."""
        return f"{self.prefix}_{name}"
