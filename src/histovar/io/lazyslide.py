"""Run a histovar model in LazySlide on the features of a slide's tiles."""

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

    LazySlide passes the features and coordinates of all tiles of a slide at once, so that neighbourhoods and
    standardisation within the section are as in :func:`histovar.tl.predict`, which predicts with its defaults.
    LazySlide does not say how the features were made: choose a table with the encoder and field of training (for
    embeddings of :func:`histovar.pp.embed`, use :func:`histovar.pp.tile` and :func:`histovar.tl.predict`, which check
    this). For a model of several embeddings, the table has them concatenated in the order of training.

    Parameters
    ----------
    model
        A model with both stages trained, without covariates.
    mpp
        Microns per pixel of the slide, ``wsi.properties.mpp``, so that neighbourhoods span the same distance as in
        training; needed if the model knows the spacing of its training spots.

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
    # LazySlide's flags for a model that needs the coordinates and all tiles of a slide.
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
                "mpp: needed, since the model adapts neighbourhoods to the spacing in microns; give "
                "mpp=wsi.properties.mpp"
            )
        self.model, self.mpp, self.device = model, mpp, "auto"
        if embedded_by(registry):
            logger.warning(
                "LazySlide does not say how features were made; choose a table made as in training: %s",
                embedded_by(registry),
            )

    def predict(self, features: Any, coords: Any = None) -> dict[str, NDArray[np.float32]]:
        """Predict the tiles of a slide.

        Parameters
        ----------
        features
            (n_tiles, width) embeddings of all tiles.
        coords
            (n_tiles, 2) positions of the tiles, in pixels at full resolution.

        Returns
        -------
        dict
            For each gene the mean, under its name, and the standard deviation, under its name with ``"_std"``,
            (n_tiles,) each, in the units of training.

        Raises
        ------
        ValueError
            If there are no coordinates, the width is not that of training, or :func:`histovar.tl.predict` refuses them.
        """
        if coords is None:
            raise ValueError(
                "coords: the model needs the tiles' positions; lazyslide.tl.feature_prediction passes them"
            )
        registry, values = self.model.registry, np.asarray(features, dtype=np.float32)
        widths = registry["embedding_dims"]
        if values.ndim != 2 or values.shape[1] != sum(widths):
            raise ValueError(
                f"features: shape {values.shape}, expected (n_tiles, {sum(widths)}), the embeddings "
                + " and ".join(f"{rep} ({w})" for rep, w in zip(registry["use_rep"], widths, strict=True))
            )
        adata = AnnData(obs=pd.DataFrame(index=pd.RangeIndex(len(values)).astype(str)))
        if registry["library_key"] is not None:
            adata.obs[registry["library_key"]] = SECTION
        embeddings = np.split(values, np.cumsum(widths)[:-1], axis=1)
        for rep, embedding in zip(registry["use_rep"], embeddings, strict=True):
            adata.obsm[rep] = embedding
        adata.obsm[registry["spatial_key"]] = np.asarray(coords, dtype=np.float64)
        if self.mpp is not None:
            adata.uns["spatial"] = {SECTION: {"scalefactors": {"microns_per_pixel": self.mpp}}}
        # LazySlide calls this in inference mode, whose tensors could no longer be trained on.
        with torch.inference_mode(False), torch.no_grad():
            predict(adata, self.model, tokens=False, device=self.device)
        predicted = prediction(adata)
        by_suffix = {"": predicted.X, "_std": predicted.layers["std"]}
        return {
            f"{gene}{suffix}": values[:, i]
            for i, gene in enumerate(predicted.var_names)
            for suffix, values in by_suffix.items()
        }

    def to(self, device: Any) -> Self:
        """Set the device to predict on.

        Apple's MPS, which LazySlide chooses by itself, has given NaN: the CPU is used instead.
        """
        self.device = "cpu" if str(device).startswith("mps") else str(device)
        return self

    def get_transform(self) -> None:
        """Return no image transform, since the model takes features."""

    def try_compile(self, **compile_kws: Any) -> None:
        """Do nothing: the model is not compiled."""
