"""Write the README.md of a saved model: a model card with metadata for the Hugging Face Hub.

histovar rewrites the section between two marks; all other text belongs to the people who edit the file, and is kept.
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
# Tissue, species and licence as an earlier README.md states them.
DESCRIBED = re.compile(r"^\| (Tissue|Species|Licence) \| (.*) \|$", re.MULTILINE)
# The hub's identifiers of licences (https://huggingface.co/docs/hub/repositories-licenses); others are given by name.
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
# Most genes to list by name.
GENES_NAMED = 2000


def readme(
    registry: Mapping[str, Any],
    config: ModelConfig,
    history: Mapping[str, pd.DataFrame],
    earlier: str | None = None,
) -> str | None:
    """Write a model card in Markdown.

    Parameters
    ----------
    registry, config, history
        Registry, configuration and training history of the model.
    earlier
        The existing README.md. Text outside histovar's section is kept, and metadata that the model does not set.

    Returns
    -------
    str or None
        What the model predicts and from what, what it was trained and calibrated on, its score in training, how to use
        it, and its limits; unknown facts are left out. None if `earlier` has no section by histovar.
    """
    section = f"{BEGIN}\n{_section(registry, config, history)}\n{END}"
    if earlier is None:
        return f"---\n{_metadata(registry, {}, {})}---\n\n# Gene expression from H&E histology\n\n{section}\n"
    ours = OURS.search(earlier)
    if ours is None:
        return None
    before = dict(DESCRIBED.findall(ours[0]))
    text = OURS.sub(lambda _: section, earlier, count=1)
    front = FRONT_MATTER.match(text)
    if front is None:
        return f"---\n{_metadata(registry, {}, before)}---\n\n{text}"
    try:
        metadata = yaml.safe_load(front[1]) or {}
    except yaml.YAMLError:
        metadata = None
    if not isinstance(metadata, dict):
        logger.warning("%s: the metadata between the lines --- are not valid YAML, and stay as they are", FILE)
        return text
    return f"---\n{_metadata(registry, metadata, before)}---\n{text[front.end() :]}"


def _metadata(registry: Mapping[str, Any], earlier: Mapping[str, Any], before: Mapping[str, str]) -> str:
    """Metadata for the hub as YAML, updated from those of an earlier README.md.

    Parameters
    ----------
    registry
        Registry of the model.
    earlier
        Metadata of the earlier README.md; what the model does not set is kept.
    before
        Tissue, species and licence that the earlier README.md states, whose tags and licence are replaced.
    """
    description, tags = registry.get("description") or {}, earlier.get("tags")
    own = [_tag(description[name]) for name in ("tissue", "species") if description.get(name)]
    outdated = {_tag(before[name]) for name in ("Tissue", "Species") if name in before}
    kept = [tag for tag in tags if isinstance(tag, str) and tag not in outdated] if isinstance(tags, list) else []
    fields = {"library_name": "histovar", **earlier, "tags": list(dict.fromkeys([*kept, *TAGS, *own]))}
    licence = description.get("licence")
    if licence or "Licence" in before:
        for field in ("license", "license_name"):
            fields.pop(field, None)
    if licence:
        is_known = licence.lower() in LICENCES
        fields |= {"license": licence.lower()} if is_known else {"license": "other", "license_name": licence}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _tag(text: str) -> str:
    """Turn text into a tag of the hub: lower case, words joined by hyphens."""
    return "-".join(text.replace("\\|", "|").lower().split())


def _section(registry: Mapping[str, Any], config: ModelConfig, history: Mapping[str, pd.DataFrame]) -> str:
    """Section of the README.md that histovar writes."""
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
    """Best correlation on the held-out spots that were watched in training."""
    table = history.get("stage2")
    if table is None or "val_pcc" not in table or table["val_pcc"].isna().all():
        return {}
    return {"Correlation on the spots watched in training": f"{table['val_pcc'].max():.3f} (Pearson, mean over genes)"}


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("\n", " ").replace("|", "\\|")


def _code(name: str) -> str:
    """Format a name as inline code."""
    return f"`{name.replace('`', '')}`"
