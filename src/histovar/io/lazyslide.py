"""A saved model as one that LazySlide runs on the features of a slide's tiles."""

from __future__ import annotations

import logging
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from histovar._arguments import Positive, check_arguments
from histovar.get import prediction
from histovar.model.summary import embedded_by
from histovar.tl import predict
from histovar.tl._trained import Trained

logger = logging.getLogger(__name__)

SECTION = "slide"


class LazySlideModel:
    """A trained model for ``lazyslide.tl.feature_prediction``.

    LazySlide gives it the features and coordinates of all tiles of a slide at once, so that neighbourhoods, and what is
    standardised within the section, are as in :func:`histovar.tl.predict`, whose defaults predict. It does not say what
    made the features: give a table of those that the model was trained on (with :func:`histovar.pp.embed`, use
    :func:`histovar.pp.tile` and :func:`histovar.tl.predict`, which compare it). Of a model of several embeddings, the
    table has them side by side, in the order of training.

    Parameters
    ----------
    model
        A model with both stages trained, without covariates.
    mpp
        Microns per pixel of the slide, ``wsi.properties.mpp``, by which neighbourhoods reach as far as in training;
        needed where the model knows how far apart its training spots lay.

    Raises
    ------
    ValueError
        If the model is not trained or needs covariates, or `mpp` is needed.

    Examples
    --------
    >>> predictor = hv.io.LazySlideModel(model, mpp=wsi.properties.mpp)  # doctest: +SKIP
    >>> zs.tl.feature_prediction(wsi, predictor, feature_key="uni")  # doctest: +SKIP
    >>> wsi.tables["histovar_tiles"][:, ["ERBB2", "ERBB2_std"]]  # doctest: +SKIP
    """

    name = "histovar"
    # What LazySlide asks of a model that looks beyond a tile.
    needs_coords = True
    whole_slide = True

    @check_arguments
    def __init__(self, model: Trained, *, mpp: Positive | None = None) -> None:
        registry = model.registry
        if registry["covariates"]:
            raise ValueError(
                f"model: it needs covariates {list(registry['covariates'])}, which LazySlide does not pass on; use "
                "histovar.pp.tile on the slide, and histovar.tl.predict"
            )
        if mpp is None and registry.get("spacing_um") is not None:
            raise ValueError(
                "mpp: the model knows how far apart its training spots lay, in microns; give mpp=wsi.properties.mpp"
            )
        self.model, self.mpp, self.device = model, mpp, "auto"
        if embedded_by(registry):
            logger.warning(
                "LazySlide does not say what made a table of features; give one made as for training: %s",
                embedded_by(registry),
            )

    def predict(self, features: Any, coords: Any = None) -> dict[str, NDArray[np.float32]]:
        """Predict the tiles of a slide.

        Parameters
        ----------
        features
            (n_tiles, width): the embeddings of all tiles.
        coords
            (n_tiles, 2): where the tiles are, in pixels of the finest resolution.

        Returns
        -------
        dict
            Of each gene the mean, under its name, and the standard deviation, under its name and ``"_std"``, (n_tiles,)
            each, in the units of training.

        Raises
        ------
        ValueError
            If there are no coordinates, the width is not that of training, or :func:`histovar.tl.predict` refuses them.
        """
        if coords is None:
            raise ValueError("coords: the model needs where the tiles are; call it by lazyslide.tl.feature_prediction")
        registry, values = self.model.registry, np.asarray(features, dtype=np.float32)
        widths = registry["embedding_dims"]
        if values.ndim != 2 or values.shape[1] != sum(widths):
            raise ValueError(
                f"features: have shape {values.shape}, expected (n_tiles, {sum(widths)}), which is "
                + " and ".join(f"{rep} ({w})" for rep, w in zip(registry["use_rep"], widths, strict=True))
            )
        adata = AnnData(obs=pd.DataFrame(index=pd.RangeIndex(len(values)).astype(str)))
        if registry["library_key"] is not None:
            adata.obs[registry["library_key"]] = SECTION
        for rep, part in zip(registry["use_rep"], np.split(values, np.cumsum(widths)[:-1], axis=1), strict=True):
            adata.obsm[rep] = part
        adata.obsm[registry["spatial_key"]] = np.asarray(coords, dtype=np.float64)
        if self.mpp is not None:
            adata.uns["spatial"] = {SECTION: {"scalefactors": {"microns_per_pixel": self.mpp}}}
        # Not as LazySlide computes: tensors made in inference mode could not be trained on any more.
        with torch.inference_mode(False), torch.no_grad():
            predict(adata, self.model, tokens=False, device=self.device)
        predicted = prediction(adata)
        named = {"": predicted.X, "_std": predicted.layers["std"]}
        return {f"{gene}{of}": x[:, i] for i, gene in enumerate(predicted.var_names) for of, x in named.items()}

    def to(self, device: Any) -> Self:
        """Predict on a device from now on.

        Apple's MPS, which LazySlide picks by itself, has given NaN: there the CPU predicts.
        """
        self.device = "cpu" if str(device).startswith("mps") else str(device)
        return self

    def get_transform(self) -> None:
        """None: it takes features, not images."""

    def try_compile(self, **compile_kws: Any) -> None:
        """Nothing is compiled."""
