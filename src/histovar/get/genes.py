"""Table of how far each gene of a model can be trusted."""

from __future__ import annotations

import pandas as pd
from pydantic import InstanceOf

from histovar._arguments import check_arguments
from histovar.metrics.gene_trust import gene_table
from histovar.model import TwoStageVARST


@check_arguments
def genes(model: InstanceOf[TwoStageVARST]) -> pd.DataFrame:
    """Table of the genes of a model: the accuracy to expect of each on an unseen section, with interval and q-value.

    Taken from spots that were predicted without having been seen (:func:`histovar.tl.calibrate`, which
    :func:`histovar.tl.train` calls on its training sections): each section, or individual where these were named, by
    the members of the model that were trained on the others.

    Parameters
    ----------
    model
        A calibrated model.

    Returns
    -------
    DataFrame
        Indexed by gene, in the order of the panel:

        - ``expected_pearson``: Pearson correlation over the spots of a new section that is to be expected of the values
          that :func:`histovar.tl.predict` writes by default, as :func:`histovar.tl.evaluate` scores it.
        - ``lower``, ``upper``: it lies between them on 90 % of new sections, as far as these are like those compared.
        - ``ceiling``: what no prediction can exceed, as counts are noisy (:func:`histovar.metrics.noise_ceiling`, mean
          over sections); NaN of models that did not learn from counts.
        - ``share_of_ceiling``: ``expected_pearson`` over ``ceiling``.
        - ``p_value``: probability that a gene whose pattern is not predicted correlates as highly by chance, given how
          smooth the maps are; where counts are known, beyond what the depth of sequencing explains of both sides.
        - ``q_value``: the same for many genes at once (Benjamini & Hochberg 1995): of the genes with ``q_value < 0.1``
          a tenth at most, on average, is not predicted.

        ``attrs`` has ``"expected on"``, what the expectation is for: an unseen section, an unseen individual or, of
        models trained on one or two sections of one individual, unseen parts of these sections, which says nothing of
        another section; ``"groups"``, the sections or individuals that were compared, and ``"n_spots"`` of each.

    Raises
    ------
    ValueError
        If the model was not calibrated, or by an earlier version.

    Notes
    -----
    Each gene's accuracy is Fisher's z of its correlation, averaged over sections or individuals and shrunk towards the
    mean of all genes (empirical Bayes). The interval holds how far they are apart, with what is known of others
    weighing as one more, and the noise of sampling spots, of which autocorrelation leaves fewer that are independent
    (Clifford, Richardson & Hémon 1989). Members that have not seen a section are fewer, and were trained on fewer
    sections, than those that predict a new one: expectations err on the low side.
    """
    return gene_table(model.registry)
