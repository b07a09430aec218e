"""The model card that people read, ``README.md`` with the metadata of the Hugging Face Hub.

histovar rewrites the part between two marks; all else belongs to the people who edit the file, and is kept.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
import yaml

from .config import ModelConfig
from .summary import summarize

logger = logging.getLogger(__name__)

FILE = "README.md"
BEGIN = "<!-- histovar: from here to the next mark, each save writes anew; what is above or below it stays -->"
END = "<!-- histovar: the end of what is written anew -->"
OURS = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
FRONT_MATTER = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
TAGS = ("histology", "spatial-transcriptomics", "gene-expression")
# What was said of tissue, species and licence when the part was written.
SAID = re.compile(r"^\| (Tissue|Species|Licence) \| (.*) \|$", re.MULTILINE)
# By these the hub knows licences (https://huggingface.co/docs/hub/repositories-licenses); others it takes by name.
LICENCES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl
    gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++
    osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)
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
        return f"---\n{_metadata(registry, {}, {})}---\n\n# Gene expression from H&E histology\n\n{part}\n"
    ours = OURS.search(earlier)
    if ours is None:
        return None
    said = dict(SAID.findall(ours[0]))
    text = OURS.sub(lambda _: part, earlier, count=1)
    front = FRONT_MATTER.match(text)
    if front is None:
        return f"---\n{_metadata(registry, {}, said)}---\n\n{text}"
    try:
        there = yaml.safe_load(front[1]) or {}
    except yaml.YAMLError:
        there = None
    if not isinstance(there, dict):
        logger.warning("%s: its metadata, between the lines ---, are not YAML and stay as they are", FILE)
        return text
    return f"---\n{_metadata(registry, there, said)}---\n{text[front.end() :]}"


def _metadata(registry: Mapping[str, Any], there: Mapping[str, Any], said: Mapping[str, str]) -> str:
    """Metadata of the hub: what is there, but for what was `said` of the model before, and what it says now."""
    described, tags = registry.get("description") or {}, there.get("tags")
    own = [_tag(described[name]) for name in ("tissue", "species") if described.get(name)]
    before = {_tag(said[name]) for name in ("Tissue", "Species") if name in said}
    kept = [tag for tag in tags if isinstance(tag, str) and tag not in before] if isinstance(tags, list) else []
    fields = {"library_name": "histovar", **there, "tags": list(dict.fromkeys([*kept, *TAGS, *own]))}
    licence = described.get("licence")
    if licence or "Licence" in said:
        for field in ("license", "license_name"):
            fields.pop(field, None)
    if licence:
        known = licence.lower() in LICENCES
        fields |= {"license": licence.lower()} if known else {"license": "other", "license_name": licence}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _tag(text: str) -> str:
    return "-".join(text.replace("\\|", "|").lower().split())


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
