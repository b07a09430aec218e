"""Write an HTML report of a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from histovar._arguments import ConfidenceLevel, Key, KeyOrKeys, PathLike, check_arguments, refuse_value
from histovar._extras import import_extra
from histovar._keys import DEFAULT_KEY, Keys, Prefix
from histovar.anndata_io import gate
from histovar.anndata_io.gate import Data
from histovar.metrics.gene_trust import gene_table
from histovar.model import TwoStageVARST


def _html_file(value: Path) -> Path:
    if value.suffix.lower() not in (".html", ".htm"):
        refuse_value("a file that ends in .html")
    if value.is_dir() or not value.parent.is_dir():
        refuse_value("a file in a directory that exists")
    return value


def _trained(model: TwoStageVARST) -> TwoStageVARST:
    return model if "genes" in model.registry else refuse_value("a trained model")


@check_arguments
def report(
    data: Data,
    path: Annotated[PathLike, AfterValidator(_html_file)],
    model: Annotated[TwoStageVARST, AfterValidator(_trained)] | None = None,
    *,
    genes: KeyOrKeys | None = None,
    title: Key = "Predicted gene expression",
    key: Prefix = DEFAULT_KEY,
    library_key: Key | None = None,
    layer: Key | None = None,
    confidence_level: ConfidenceLevel = 0.9,
    gene_symbols: Key | None = None,
    table_name: Key | None = None,
) -> None:
    """Write an interactive HTML report of a prediction: one file for any browser, which needs no network.

    On the left, choose section, gene, quantity (predicted mean, standard deviation, ends of the interval and, if
    available, the measurement) and opacity of the spots. In the middle is the map over the H&E, to zoom and hover; on
    the right the table of genes, calibration (if expression was measured), scores (if :func:`histovar.tl.evaluate` was
    called) and what the model was trained on. Warnings on top name sections that are unlike those of training, were
    trained on, are shallow or have few spots, and intervals that are not calibrated.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`histovar.tl.predict` has written to. Images are taken from
        ``uns["spatial"]``, as in :func:`spatial`.
    path
        File to write, ending in ``.html``, in a directory that exists. An existing file is replaced.
    model
        The model that made the prediction, to report its training data and the expected accuracy of its genes.
    genes
        Genes of the panel, by name, or by symbol if `gene_symbols` is given; all by default. Genes times spots may be 8
        million at most.
    title
        Heading of the page.
    key
        Prefix of the slots.
    library_key
        Column of ``obs`` with the section; that of the prediction by default.
    layer
        Layer with measured expression; by default the layer trained on, if it exists.
    confidence_level
        Share of the measured values that intervals should contain, between 0 and 1 (both excluded).
    gene_symbols
        Column of ``var`` with the genes' symbols, if names are identifiers such as Ensembl's: the page then shows
        symbols.
    table_name
        Table of a SpatialData.

    Notes
    -----
    Values are rounded to a thousandth of their gene's range, images to 1,600 pixels: 4,000 spots and 200 genes take
    some 10 MB.

    Raises
    ------
    ImportError
        If Bokeh is not installed: ``pip install 'histovar[report]'``.
    KeyError
        If there is no prediction, a gene is not in the panel, or coordinates, `layer` or column `gene_symbols` are
        missing.
    ValueError
        If `model` is not the one that made the prediction, there are too many genes for a page, draws or quantiles do
        not reach as far out as `confidence_level`, several genes of the panel have the same symbol, or `layer` is in
        other units.
    OSError
        If the file cannot be written.
    """
    import_extra("bokeh", "report", "histovar.pl.report")
    from histovar.report import collect, write_page

    adata = gate.table(data, table_name, writes=False)
    content = collect(
        adata,
        Keys(key),
        model=model,
        trust=gene_table(model.registry) if model is not None and model.registry.get("trust") else None,
        genes=None if genes is None else list(genes),
        title=title,
        library_key=library_key,
        layer=layer,
        confidence_level=confidence_level,
        gene_symbols=gene_symbols,
    )
    write_page(content, Path(path))
