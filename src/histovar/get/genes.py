"""Get the expected accuracy of each gene of a model as a table."""

from __future__ import annotations

import pandas as pd
from pydantic import InstanceOf

from histovar._arguments import check_arguments
from histovar.metrics.gene_trust import gene_table
from histovar.model import TwoStageVARST


@check_arguments
def genes(model: InstanceOf[TwoStageVARST]) -> pd.DataFrame:
    """Get the expected accuracy of each gene of a model on an unseen section, with interval and q-value.

    It is measured on spots that were not seen by what predicted them (:func:`histovar.tl.calibrate`, which
    :func:`histovar.tl.train` calls on its training sections): each section, or individual if `group_key` was given, is
    predicted by the ensemble members that were trained on the others.

    Parameters
    ----------
    model
        A calibrated model.

    Returns
    -------
    DataFrame
        Indexed by gene, in the order of the panel:

        - ``expected_pearson``: expected Pearson correlation over the spots of a new section, for the values that
          :func:`histovar.tl.predict` writes by default, scored as by :func:`histovar.tl.evaluate`.
        - ``lower``, ``upper``: the correlation lies between them on 90 % of new sections, if these resemble the
          sections that were compared.
        - ``ceiling``: correlation that no prediction can exceed, since counts are noisy
          (:func:`histovar.metrics.noise_ceiling`, mean over sections); NaN for models that did not learn from counts.
        - ``share_of_ceiling``: ``expected_pearson`` over ``ceiling``.
        - ``p_value``: probability that a gene whose pattern is not predicted has such a correlation by chance, given
          the smoothness of the maps; where counts are known, after removing what sequencing depth explains.
        - ``q_value``: p-value adjusted for the number of genes (Benjamini & Hochberg 1995): of the genes with
          ``q_value < 0.1``, on average at most a tenth is not predicted.

        ``attrs`` has ``"expected on"``, what the accuracy was measured on: an unseen section, an unseen individual or,
        for models trained on one or two sections of one individual, unseen parts of these sections, which says nothing
        about other sections; ``"groups"``, the sections or individuals that were compared, and ``"n_spots"`` of each.

    Raises
    ------
    ValueError
        If the model was not calibrated, or by an earlier version.

    Notes
    -----
    Each gene's accuracy is Fisher's z of its correlation, averaged over sections or individuals and shrunk towards the
    mean of all genes (empirical Bayes). The interval's width includes the variance between sections or individuals,
    for which the variance of the other genes counts as one more observation, and the sampling noise of spots, whose
    autocorrelation leaves fewer independent ones (Clifford, Richardson & Hémon 1989). Fewer members predict a section
    they have not seen, trained on fewer sections, than predict a new one: the expected accuracy errs on the low side.
    """
    return gene_table(model.registry)
