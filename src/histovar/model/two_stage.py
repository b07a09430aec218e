"""The model that users train, save, load and share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from histovar._arguments import Key, PathLike, check_arguments, not_bool

from .checkpoint import load_model, load_stage, save_model
from .hub import push_model
from .network import TwoStageNetwork

Stage = Annotated[Literal[1, 2], not_bool]


class TwoStageVARST(TwoStageNetwork):
    """Two-stage generative model of spatial gene expression given histology.

    Stage 1 (:class:`MultiScaleGeneVQVAE`) turns expression into tokens at nested scales; stage 2
    (:class:`VARStage`) generates the tokens from histology embeddings. Most users get one from
    :func:`histovar.tl.train` and never call its methods, :meth:`save` and :meth:`load` apart.

    Parameters
    ----------
    config
        The model's configuration. Without ``embedding_dims`` there is no stage 2 yet; see ``add_stage2``.

    Attributes
    ----------
    registry : dict
        What the model was trained on: genes, layer and units, embedding keys and widths, covariates and so
        on. Plain types only.
    history : dict of :class:`pandas.DataFrame`
        ``"stage1"`` and ``"stage2"``: what training watched, one row an epoch.
    """

    @check_arguments
    def describe(self, *, tissue: str | None = None, species: str | None = None, licence: str | None = None) -> None:
        """Say of the model what its data do not, for its README.md and the Hugging Face Hub.

        Kept in :attr:`registry` as ``"description"``, saved and loaded with the model, and shown by ``histovar info``.

        Parameters
        ----------
        tissue, species
            What it was trained on, such as ``"breast cancer"`` and ``"human"``; also tags on the hub. None leaves what
            was said before, ``""`` takes it back; so with `licence`.
        licence
            Licence of the model, by the `hub's identifier
            <https://huggingface.co/docs/hub/repositories-licenses>`_, such as ``"cc-by-4.0"``, or by its name.
        """
        given = {"tissue": tissue, "species": species, "licence": licence}
        # None, of what is taken back: beside a stage of earlier, which still says it, that is not the same as nothing.
        said = {name: text.strip() or None for name, text in given.items() if text is not None}
        self.registry["description"] = {**(self.registry.get("description") or {}), **said}

    @check_arguments
    def save(self, path: PathLike) -> None:
        """Write the model to a directory: weights as safetensors, all else as JSON, and a README.md that describes it.

        In a distributed run, the first process does. A model that is there is replaced in one step: killed at any
        moment, a save leaves the old one or the new one. Other files in the directory stay. Of a README.md, the part
        between histovar's marks is written anew, and what you write around it stays, metadata for the hub included, but
        not comments in that; one without the marks stays as it is, which is warned of.

        Parameters
        ----------
        path
            Directory, made if absent.

        Raises
        ------
        NotADirectoryError
            If there is a file of that name.
        ValueError
            If a weight is not finite, if :attr:`registry` is not plain, or if there is a ``model.json`` of something
            else.
        OSError
            If the disk is full or writing is refused; the earlier model is as it was.
        """
        save_model(self, Path(path))

    @classmethod
    @check_arguments
    def load(cls, path: PathLike) -> Self:
        """Read a model that :meth:`save` or :meth:`push` wrote.

        Parameters
        ----------
        path
            Its directory; or ``"hf://owner/name"``, with ``"@revision"`` if not the newest, of the Hugging Face Hub,
            whose cache is enough without a network.

        Returns
        -------
        TwoStageVARST
            In evaluation mode, on the CPU.

        Raises
        ------
        FileNotFoundError
            If there is no such directory, or a file is missing from it; if the hub has no such model, or cannot be
            reached and its cache has none.
        ImportError
            If the hub is asked and huggingface-hub is not installed: ``pip install 'histovar[hub]'``.
        ValueError
            If it is not a model, or was written in a newer format; if its card or its weights are truncated, damaged or
            edited, do not belong together, or hold values that are not finite.
        """
        return load_model(cls, Path(path))

    @check_arguments
    def push(self, repository: Key, *, private: bool = False) -> str:
        """Save the model to the Hugging Face Hub, from where :meth:`load` reads ``"hf://owner/name"``.

        A README.md that is there is kept as :meth:`save` keeps it: edit it on the hub, or before with :meth:`describe`.

        Parameters
        ----------
        repository
            ``"owner/name"``, made if absent.
        private
            Whether a repository that is made is private.

        Returns
        -------
        str
            Its new revision.

        Raises
        ------
        ImportError
            If huggingface-hub is not installed: ``pip install 'histovar[hub]'``.
        ValueError
            If `repository` is not of that form, and where :meth:`save` raises it.
        ConnectionError
            If the hub cannot be reached or refuses, as without ``hf auth login``.
        """
        return push_model(self.save, repository, private=private)

    @check_arguments
    def save_stage(self, path: PathLike, stage: Stage) -> None:
        """Write one stage to a directory, in the format of :meth:`save`.

        Where the directory holds the other stage, of a model with the same stage 1, that stage is kept, and the two
        make a whole model. The same stage is replaced.

        Parameters
        ----------
        path
            Directory, made if absent.
        stage
            1 or 2.

        Raises
        ------
        ValueError
            If the directory holds the other stage of a model with another stage 1; if the model has no such stage; and
            where :meth:`save` raises it.
        OSError
            As :meth:`save`.
        """
        save_model(self, Path(path), stages=(stage,))

    @check_arguments
    def load_stage(self, path: PathLike, stage: Stage) -> None:
        """Take one stage from a directory into this model.

        Parameters
        ----------
        path
            Directory that :meth:`save` or :meth:`save_stage` wrote.
        stage
            1 or 2.

        Raises
        ------
        ValueError
            If the directory holds no such stage, or one of another shape or gene panel; or if stage 1 and stage 2 would
            not be those that were trained together.
        """
        load_stage(self, Path(path), stage)
