"""Look up and show genes by symbol where their names are identifiers such as Ensembl's."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from anndata import AnnData

from histovar._arguments import did_you_mean, nearest

from .prediction import genes_of_panel


def find_genes(adata: AnnData, panel: Sequence[str], genes: Sequence[str], gene_symbols: str | None) -> list[str]:
    """Find genes of the panel by name or by symbol.

    Parameters
    ----------
    adata
        Object with the symbols.
    panel
        Names of the predicted genes.
    genes
        Their symbols, or names where `gene_symbols` is None.
    gene_symbols
        Column of ``var`` with the symbols.

    Raises
    ------
    KeyError
        If there is no such column, or a gene is not in the panel.
    ValueError
        If several genes of the panel have the same symbol.
    """
    if gene_symbols is None:
        return genes_of_panel(panel, genes)
    column = _symbols(adata, panel, gene_symbols).dropna()
    unknown = sorted(set(genes) - set(column))
    if unknown:
        suggestion = did_you_mean(nearest(unknown, column))
        raise KeyError(
            f"genes: no gene of the predicted panel has the symbol {unknown} in var[{gene_symbols!r}]{suggestion}"
        )
    names_by_symbol = {symbol: column.index[column == symbol].tolist() for symbol in genes}
    ambiguous = {symbol: names for symbol, names in names_by_symbol.items() if len(names) > 1}
    if ambiguous:
        raise ValueError(f"genes: several genes have the same symbol, {ambiguous}; give names, without gene_symbols")
    return [names[0] for names in names_by_symbol.values()]


def gene_labels(adata: AnnData, genes: Sequence[str], gene_symbols: str | None) -> list[str]:
    """Label genes by symbol, by name if they have none, and by both if several share a symbol.

    Parameters
    ----------
    adata
        Object with the symbols.
    genes
        Names of the genes.
    gene_symbols
        Column of ``var`` with the symbols; None for the names.

    Raises
    ------
    KeyError
        If there is no such column.
    """
    if gene_symbols is None:
        return list(genes)
    names = pd.Series(list(genes))
    labels = _symbols(adata, genes, gene_symbols).reset_index(drop=True).fillna(names)
    shared = labels.duplicated(keep=False)
    return labels.mask(shared, labels + " (" + names + ")").tolist()


def _symbols(adata: AnnData, genes: Sequence[str], gene_symbols: str) -> pd.Series:
    """Symbols of genes, indexed by name; missing if a gene has none."""
    if gene_symbols not in adata.var:
        suggestion = did_you_mean(map(repr, nearest([gene_symbols], map(str, adata.var))))
        raise KeyError(f"gene_symbols: no {gene_symbols!r} in var, which has {list(adata.var)}{suggestion}")
    column = adata.var[gene_symbols].reindex(pd.Index(genes)).astype(object)
    missing = column.isna() | (column == "")
    return column.astype(str).mask(missing)
