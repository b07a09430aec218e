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
    """Write a report: one HTML file with maps, scores and cautions, for any browser, also without a network.

    On the left a chooser of section, gene and quantity (predicted mean, standard deviation, ends of the interval, and
    what was measured, where it was) and the opacity of the spots; in the middle the map over the H&E, to zoom and to
    point at; on the right the table of genes, calibration (where expression was measured), scores (where
    :func:`histovar.tl.evaluate` left some) and what the model was trained on. Above, what to be careful about: sections
    unlike those of training, trained on, shallow or of few spots, intervals that are not calibrated.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`histovar.tl.predict` has written to. Images are taken from
        ``uns["spatial"]``, as in :func:`spatial`.
    path
        File to write, which ends in ``.html``, in a directory that exists. A file that is there is replaced.
    model
        The model that predicted, for what it was trained on and which of its genes can be trusted.
    genes
        Genes of the panel, by name, or by symbol where `gene_symbols` is given; all of them by default. Genes times
        spots are 8 million at most.
    title
        Heading of the page.
    key
        Prefix of the slots.
    library_key
        Column of ``obs`` with the section; that of the prediction by default.
    layer
        Layer with measured expression; the layer trained on by default, if it is there.
    confidence_level
        Share of what is measured that the intervals are to hold, more than 0 and less than 1.
    gene_symbols
        Column of ``var`` with the genes' symbols, where names are identifiers such as Ensembl's: the page then has
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
        If there is no prediction, a gene is not in the panel, there are no coordinates, or no `layer` or column
        `gene_symbols`.
    ValueError
        If `model` is another than that which predicted, there are too many genes for a page, draws or quantiles do not
        reach as far out as `confidence_level`, a symbol is that of several genes of the panel, or `layer` is in other
        units.
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
