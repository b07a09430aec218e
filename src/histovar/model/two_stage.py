"""The two-stage model as users train, save, load and share it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from histovar._arguments import Key, PathLike, check_arguments, not_bool
from histovar._printable import printable

from .checkpoint import load_model, load_stage, save_model
from .hub import push_model
from .network import TwoStageNetwork
from .summary import summarize

Stage = Annotated[Literal[1, 2], not_bool]


class TwoStageVARST(TwoStageNetwork):
    """Two-stage generative model of spatial gene expression given histology.

    Stage 1 (:class:`MultiScaleGeneVQVAE`) turns expression into tokens at nested scales; stage 2
    (:class:`VARStage`) generates the tokens from histology embeddings. Most users get a model from
    :func:`histovar.tl.train`, and call none of its methods but :meth:`save` and :meth:`load`.

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
        ``"stage1"`` and ``"stage2"``: metrics of training, one row for each epoch.
    """

    def __repr__(self) -> str:
        """What the model learnt from and what it predicts, a fact a line; ``print(model.stage1)`` lists layers."""
        facts = summarize(self.registry, self.config)
        return "\n".join([type(self).__name__, *(f"    {name}: {printable(text)}" for name, text in facts.items())])

    @check_arguments
    def describe(self, *, tissue: str | None = None, species: str | None = None, licence: str | None = None) -> None:
        """Describe the model's tissue, species and licence, for its README.md and the Hugging Face Hub.

        Kept in :attr:`registry` as ``"description"``, saved and loaded with the model, and shown by ``histovar info``.

        Parameters
        ----------
        tissue, species
            What it was trained on, such as ``"breast cancer"`` and ``"human"``; also tags on the hub. None keeps the
            earlier description, ``""`` removes it; the same holds for `licence`.
        licence
            Licence of the model: the `hub's identifier
            <https://huggingface.co/docs/hub/repositories-licenses>`_, such as ``"cc-by-4.0"``, or any name.
        """
        given = {"tissue": tissue, "species": species, "licence": licence}
        # None marks what was removed: a stage trained before may still have it on its card.
        changes = {name: text.strip() or None for name, text in given.items() if text is not None}
        self.registry["description"] = {**(self.registry.get("description") or {}), **changes}

    @check_arguments
    def save(self, path: PathLike) -> None:
        """Save the model to a directory: weights as safetensors, the rest as JSON, and a README.md that describes it.

        In a distributed run, only the first process writes. A model in the directory is replaced atomically: an
        interrupted save leaves either the old model or the new one. Other files in the directory stay. In an existing
        README.md, only the section between histovar's marks is rewritten; text around it and metadata for the hub are
        kept, comments in the metadata are not. A README.md without the marks is not changed, with a warning.

        Parameters
        ----------
        path
            Directory, created if absent.

        Raises
        ------
        NotADirectoryError
            If `path` is a file.
        ValueError
            If a weight is not finite, if :attr:`registry` holds other than plain types, or if the directory has a
            ``model.json`` of another program.
        OSError
            If the disk is full or the directory is not writable; an earlier model in it is unchanged.
        """
        save_model(self, Path(path))

    @classmethod
    @check_arguments
    def load(cls, path: PathLike) -> Self:
        """Load a model that :meth:`save` or :meth:`push` wrote.

        Parameters
        ----------
        path
            Directory of the model, or ``"hf://owner/name"`` for a model on the Hugging Face Hub, with ``"@revision"``
            if not the newest. Without a network, the hub's cache is used.

        Returns
        -------
        TwoStageVARST
            In evaluation mode, on the CPU.

        Raises
        ------
        FileNotFoundError
            If there is no such directory, or a file is missing from it; if the hub has no such model, or cannot be
            reached and the model is not in its cache.
        ImportError
            If `path` is on the hub and huggingface-hub is not installed: ``pip install 'histovar[hub]'``.
        ValueError
            If the directory is not a model, or has a newer format; if card or weights are truncated, damaged or edited,
            do not belong together, or hold values that are not finite.
        """
        return load_model(cls, Path(path))

    @check_arguments
    def push(self, repository: Key, *, private: bool = False) -> str:
        """Upload the model to the Hugging Face Hub, from where :meth:`load` reads ``"hf://owner/name"``.

        A README.md on the hub is updated as in :meth:`save`: edit it there, or use :meth:`describe` before.

        Parameters
        ----------
        repository
            ``"owner/name"``, created if absent.
        private
            Whether a new repository is private.

        Returns
        -------
        str
            The new revision.

        Raises
        ------
        ImportError
            If huggingface-hub is not installed: ``pip install 'histovar[hub]'``.
        ValueError
            If `repository` has another form, and as in :meth:`save`.
        ConnectionError
            If the hub cannot be reached or denies access, for instance before ``hf auth login``.
        """
        return push_model(self.save, repository, private=private)

    @check_arguments
    def save_stage(self, path: PathLike, stage: Stage) -> None:
        """Save one stage to a directory, in the format of :meth:`save`.

        The same stage in the directory is replaced. The other stage is kept if its model has the same stage 1; the two
        then make a complete model.

        Parameters
        ----------
        path
            Directory, created if absent.
        stage
            1 or 2.

        Raises
        ------
        ValueError
            If the directory has the other stage of a model with a different stage 1; if the model has no such stage;
            and as in :meth:`save`.
        OSError
            As in :meth:`save`.
        """
        save_model(self, Path(path), stages=(stage,))

    @check_arguments
    def load_stage(self, path: PathLike, stage: Stage) -> None:
        """Load one stage from a directory into this model.

        Parameters
        ----------
        path
            Directory that :meth:`save` or :meth:`save_stage` wrote.
        stage
            1 or 2.

        Raises
        ------
        ValueError
            If the directory has no such stage, or one of another shape or gene panel, or if stage 1 and stage 2 were
            not trained together.
        """
        load_stage(self, Path(path), stage)
