"""The model card that people read, ``README.md`` with the metadata of the Hugging Face Hub.

A part between two marks is histovar's and written anew; what stands around it is whoever's edits the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
import yaml

from .config import ModelConfig
from .summary import summarize

FILE = "README.md"
BEGIN = "<!-- histovar: from here to the next mark, each save writes anew; what is above or below it stays -->"
END = "<!-- histovar: the end of what is written anew -->"
OURS = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
FRONT_MATTER = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
TAGS = ("histology", "spatial-transcriptomics", "gene-expression")
# What the hub knows licences by; others it takes by name.
LICENCE_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]*")
# Genes that are named one by one.
GENES_NAMED = 2000


def readme(
    registry: Mapping[str, Any],
    config: ModelConfig,
    history: Mapping[str, pd.DataFrame],
    earlier: str | None = None,
) -> str | None:
    """Describe a model in Markdown.

    Parameters
    ----------
    registry, config, history
        Of the model.
    earlier
        The README.md that there is, of which all but histovar's part is kept, and of its metadata what the model says
        nothing of.

    Returns
    -------
    str or None
        What it predicts, from what, what it was trained and calibrated on, what was watched in training, how to use
        it, its limits. What is not known is left out. None if `earlier` has no part of histovar's.
    """
    part = f"{BEGIN}\n{_part(registry, config, history)}\n{END}"
    if earlier is None:
        return f"---\n{_metadata(registry, {})}---\n\n# Gene expression from H&E histology\n\n{part}\n"
    if OURS.search(earlier) is None:
        return None
    text = OURS.sub(lambda _: part, earlier, count=1)
    front = FRONT_MATTER.match(text)
    try:
        there = {} if front is None else yaml.safe_load(front[1])
    except yaml.YAMLError:
        return text
    if front is None or not isinstance(there, dict):
        return text
    return f"---\n{_metadata(registry, there)}---\n{text[front.end() :]}"


def _metadata(registry: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Metadata of the hub: what is there, and what the model says."""
    described = registry.get("description") or {}
    own = [described[name].lower().replace(" ", "-") for name in ("tissue", "species") if described.get(name)]
    tags = there.get("tags")
    written = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    fields = {"library_name": "histovar", **there, "tags": list(dict.fromkeys([*written, *TAGS, *own]))}
    licence = described.get("licence")
    if licence:
        fields.pop("license_name", None)
        known = LICENCE_IDENTIFIER.fullmatch(licence)
        fields |= {"license": licence} if known else {"license": "other", "license_name": licence}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _part(registry: Mapping[str, Any], config: ModelConfig, history: Mapping[str, pd.DataFrame]) -> str:
    genes = list(map(str, registry.get("genes", [])))
    facts = summarize(registry, config) | _scores(history)
    named = ", ".join(map(_code, genes[:GENES_NAMED])) + (
        f" and {len(genes) - GENES_NAMED:,} more" * (len(genes) > GENES_NAMED)
    )
    return f"""
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
