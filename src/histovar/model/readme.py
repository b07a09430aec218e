"""The model card that people read, ``README.md`` with the metadata of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from .config import ModelConfig
from .summary import summarize

FILE = "README.md"
# By its first lines a card is known as histovar's; another README.md is never overwritten.
BEGINNING = "---\nlibrary_name: histovar\n"
# Genes that are named one by one.
GENES_NAMED = 2000


def readme(registry: Mapping[str, Any], config: ModelConfig, history: Mapping[str, pd.DataFrame]) -> str:
    """Describe a model in Markdown.

    Parameters
    ----------
    registry, config, history
        Of the model.

    Returns
    -------
    str
        What it predicts, from what, what it was trained and calibrated on, what was watched in training, how to use
        it, its limits. What is not known is left out; licence, species and tissue are for whoever shares it to add.
    """
    genes = list(map(str, registry.get("genes", [])))
    facts = summarize(registry, config) | _scores(history)
    named = ", ".join(map(_code, genes[:GENES_NAMED])) + (
        f" and {len(genes) - GENES_NAMED:,} more" * (len(genes) > GENES_NAMED)
    )
    return f"""{BEGINNING}tags:
- histology
- spatial-transcriptomics
- gene-expression
---

# Gene expression from H&E histology

A model of [histovar](https://pypi.org/project/histovar), which predicts the expression of {len(genes):,} genes,
with its uncertainty, from embeddings of the H&E around each spot.

| | |
|---|---|
{"".join(f"| {name} | {_cell(text)} |{chr(10)}" for name, text in facts.items())}
## How to use it

```python
import histovar as hv

model = hv.TwoStageVARST.load("path or hf://owner/name")
hv.tl.predict(adata, model)  # adata: the embeddings named above in obsm, coordinates in obsm["spatial"]
```

## Limits

- Embeddings must be of the encoder, layers, field and resolution of training.
- Accuracy on tissue, stains, scanners and individuals unlike those of training is not known; `tl.predict` warns of
  sections that look unlike them.
- Not for diagnosis.

## Genes

{named}
"""


def _scores(history: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """The best correlation that was watched in training."""
    table = history.get("stage2")
    if table is None or "val_pcc" not in table or table["val_pcc"].isna().all():
        return {}
    return {"Correlation on the spots watched in training": f"{table['val_pcc'].max():.3f} (Pearson, mean over genes)"}


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def _code(name: str) -> str:
    return f"`{name.replace('`', '')}`"
