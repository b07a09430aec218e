"""Save and load models: a directory with a card (JSON), the weights of each stage (safetensors) and a README.md.

Saving is atomic. New weights are written beside the old ones under hidden names, then the card is renamed into place,
then the weights. A card names its weights by their SHA-256, and a reader looks for them under both names. So a process
that is killed at any moment leaves either the complete old model or the complete new one; other files in the directory
are never touched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
from safetensors.torch import save
from torch import Tensor

from histovar._atomic import atomic_file, directory_lock, flush_directory
from histovar._torch_state import in_float32

from .card import (
    AFTER_TRAINING,
    CARD,
    CHECKSUMS_SINCE,
    DESCRIPTION,
    FORMAT,
    FORMAT_VERSION,
    OF_STAGE1,
    OF_STAGE2,
    card_text,
    make_card,
    read_card,
    weights_name,
)
from .config import ModelConfig
from .distributed import rank_and_world
from .hub import local_directory
from .network import TwoStageNetwork
from .readme import FILE, readme
from .weights import (
    check_digest,
    check_finite,
    complete_standardize,
    file_digest,
    fingerprint,
    load_state,
    read_weights,
)

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=TwoStageNetwork)

# Seconds to wait for another process that is saving to the same directory.
SAVING_SECONDS, LOADING_SECONDS = 600.0, 60.0
# Temporary files that an interrupted save may leave in a model's directory.
LEFTOVERS = re.compile(
    r"\.stage[12]-[0-9a-f]{16}\.safetensors|\.\.stage[12]-.*\.tmp.*|\.(?:model\.json|README\.md)\..*\.tmp.*"
)

__all__ = ["load_model", "load_stage", "read_card", "save_model", "verify"]


def save_model(model: TwoStageNetwork, path: Path, stages: Sequence[int] = (1, 2)) -> None:
    """Write a model, or one stage of it, to a directory; in a distributed run, only the first process writes.

    Parameters
    ----------
    model
        The model.
    path
        Directory, created if absent. A model in it is replaced; other files stay.
    stages
        Stages to write, as far as the model has them. If only one is written, the other stage in the directory is kept,
        provided that both belong to the same stage 1.

    Raises
    ------
    NotADirectoryError
        If `path` is a file.
    ValueError
        If weights are not finite, if the registry holds other than plain types, or if the directory has a
        ``model.json`` of another program or a stage that does not belong to this model. Nothing is then written.
    OSError
        If the disk is full or the directory is not writable. The earlier model is then unchanged.
    """
    if rank_and_world()[0]:
        return
    modules = {1: model.stage1, 2: model.stage2}
    states = {
        stage: {name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()}
        for stage, module in modules.items()
        if stage in stages and module is not None
    }
    if not states:
        raise ValueError(f"stage: the model has no stage {' or '.join(map(str, stages))}")
    for stage, state in states.items():
        check_finite(state, f"model: stage {stage}")
    contents = {stage: save(state) for stage, state in states.items()}
    weights = {stage: hashlib.sha256(content).hexdigest() for stage, content in contents.items()}
    card = make_card(
        config=model.config,
        registry=model.registry,
        history=model.history,
        stage1_fingerprint=fingerprint(model.stage1.state_dict()),
        weights=weights,
    )
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"path: {str(path)!r} is a file; give a directory for the model")
    path.mkdir(parents=True, exist_ok=True)
    with directory_lock(path, seconds=SAVING_SECONDS) as locked:
        if len(stages) == 1:
            card = _merge_other_stage(card, path, stages[0])
        elif not _is_replaceable(path / CARD):
            raise ValueError(
                f"path: {str(path / CARD)!r} was not written by histovar; save to another directory, or remove it"
            )
        if locked:
            _finish_interrupted(path)
        try:
            for stage, content in contents.items():
                with atomic_file(_hidden_file(path, stage, weights[stage])) as file:
                    file.write_bytes(content)
            with atomic_file(path / CARD) as file:
                file.write_text(card_text(card))
        except OSError:
            if locked:
                _finish_interrupted(path)  # free the space of the unused files
            raise
        for stage in contents:
            # Without a lock, another process may have saved meanwhile, and tidied up these files.
            if _hidden_file(path, stage, weights[stage]).exists():
                os.replace(_hidden_file(path, stage, weights[stage]), path / weights_name(stage))
        for stage in {1, 2} - {*card["stages"]}:
            (path / weights_name(stage)).unlink(missing_ok=True)
        _write_readme(path, card)
        flush_directory(path)


def _write_readme(path: Path, card: Mapping[str, Any]) -> None:
    """Write histovar's part of the README.md in a model's directory; all other text in it is kept."""
    file = path / FILE
    try:
        earlier = file.read_text("utf-8") if file.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("%s: cannot be read (%s), so it stays as it is", FILE, error)
        return
    history = {name: _table(values) for name, values in card["history"].items()}
    text = readme(card["registry"], ModelConfig.from_json(json.dumps(card["config"])), history, earlier)
    if text is None:
        logger.warning(
            "%s: the marks around histovar's description of the model are missing or damaged, so the file stays as it "
            "is and may be out of date; delete or rename it to get a new one",
            FILE,
        )
    elif text != earlier:
        with atomic_file(file) as temporary:
            temporary.write_text(text, "utf-8")


def _hidden_file(path: Path, stage: int, digest: str) -> Path:
    """Path of a stage's new weights until the card that names them is in place."""
    return path / f".stage{stage}-{digest[:16]}.safetensors"


def _weights_file(path: Path, stage: int, card: Mapping[str, Any]) -> Path:
    """Path of the weights that a card names."""
    if card["format_version"] >= CHECKSUMS_SINCE:
        hidden = _hidden_file(path, stage, card["weights"][weights_name(stage)])
        if hidden.is_file():
            return hidden
    return path / weights_name(stage)


def _is_replaceable(file: Path) -> bool:
    """Whether a file is absent, or a card of histovar, possibly truncated."""
    if not file.is_file():
        return not file.exists()
    with file.open("rb") as stream:
        start = stream.read(4096)
    return not start or f'"{FORMAT}"'.encode() in start or b'"format": "'.startswith(start.strip(b"{ \n"))


def _finish_interrupted(path: Path) -> None:
    """Complete an interrupted save, and remove its temporary files; the directory must be locked."""
    try:
        card = read_card(path)
    except (ValueError, FileNotFoundError):
        pass
    else:
        for stage in card["stages"]:
            file = _weights_file(path, stage, card)
            if file.name != weights_name(stage):
                os.replace(file, path / weights_name(stage))
    for name in os.listdir(path):
        if LEFTOVERS.fullmatch(name) and (path / name).is_file():
            (path / name).unlink(missing_ok=True)


def _merge_other_stage(card: dict[str, Any], path: Path, stage: int) -> dict[str, Any]:
    """Merge the card of one stage with that of the other stage, which is in the directory.

    Raises
    ------
    ValueError
        If the stages do not belong together, or cannot be compared.
    """
    if not (path / CARD).exists():
        return card
    advice = "save to another directory, or save the whole model with save()"
    try:
        earlier = read_card(path)
    except ValueError as error:
        raise ValueError(f"{error}; or {advice}") from None
    other = 3 - stage
    if other not in earlier["stages"]:
        return card
    if earlier["format_version"] < FORMAT_VERSION:
        raise ValueError(
            f"path: {str(path)!r} holds stage {other} in format {earlier['format_version']}, to which stage {stage} "
            f"cannot be added; {advice}"
        )
    if earlier["stage1_fingerprint"] != card["stage1_fingerprint"]:
        raise ValueError(
            f"path: {str(path)!r} holds stage {other} of another model, which has a different stage 1: the two stages "
            f"do not belong together; {advice}"
        )
    check_digest(_weights_file(path, other, earlier), earlier["weights"][weights_name(other)])
    cards = {stage: card, other: earlier}
    registry = {
        name: cards[s]["registry"][name]
        for s, names in ((1, OF_STAGE1), (2, (*OF_STAGE2, *AFTER_TRAINING)))
        for name in names
        if name in cards[s]["registry"]
    }
    descriptions = [cards[s]["registry"].get(DESCRIPTION) for s in (other, stage)]
    if any(description is not None for description in descriptions):
        registry[DESCRIPTION] = {k: text for description in descriptions for k, text in (description or {}).items()}
    history = {f"stage{s}": c["history"][f"stage{s}"] for s, c in cards.items() if f"stage{s}" in c["history"]}
    digests = {s: c["weights"][weights_name(s)] for s, c in cards.items()}
    return make_card(
        config=_config(cards[2], path),
        registry=registry,
        history={name: _table(values) for name, values in sorted(history.items())},
        stage1_fingerprint=card["stage1_fingerprint"],
        weights=dict(sorted(digests.items())),
    )


def _config(card: Mapping[str, Any], path: Path) -> ModelConfig:
    """Configuration of a saved model, converted to the present format."""
    config = ModelConfig.from_json(json.dumps(card["config"]))
    if 2 not in card["stages"]:
        return config
    return complete_standardize(config, _weights_file(path, 2, card), card["format_version"])


def _table(values: Mapping[str, Any]) -> pd.DataFrame:
    """Training history of a card as a DataFrame."""
    return pd.DataFrame(values["data"], values["index"], values["columns"], dtype=float)


@contextmanager
def _shared_lock(path: Path) -> Iterator[None]:
    """Hold a shared lock on a model's directory, so that no process saves to it meanwhile."""
    if not path.is_dir():
        yield
        return
    with directory_lock(path, seconds=LOADING_SECONDS, shared=True):
        yield


def _read_stage(path: Path, stage: int, card: Mapping[str, Any], config: ModelConfig) -> dict[str, Tensor]:
    """Read and verify the weights of a stage."""
    file = _weights_file(path, stage, card)
    if card["format_version"] >= CHECKSUMS_SINCE:
        check_digest(file, card["weights"][weights_name(stage)])
    state = read_weights(file, stage, config, card["format_version"])
    expected = card.get("stage1_fingerprint")  # not in cards of the first format
    if stage == 1 and expected is not None and fingerprint(state) != expected:
        raise ValueError(f"path: {str(file)!r} holds a stage 1 that its card does not describe; save the model again")
    return state


@in_float32
def verify(path: Path) -> str:
    """Verify the checksums of a saved model's card and weights.

    Formats before 6 have no checksums: their weights are only compared with the configuration.

    Parameters
    ----------
    path
        Directory of the model.

    Returns
    -------
    str
        SHA-256 of the model, which depends on its card and weights only.

    Raises
    ------
    FileNotFoundError
        If the directory or a file is missing.
    ValueError
        If the card or the weights are damaged or changed, or do not belong together.
    """
    path = local_directory(path)
    with _shared_lock(path):
        card = read_card(path)
        if card["format_version"] >= CHECKSUMS_SINCE:
            for stage in card["stages"]:
                check_digest(_weights_file(path, stage, card), card["weights"][weights_name(stage)])
            return str(card["sha256"])
        config = _config(card, path)
        for stage in card["stages"]:
            _read_stage(path, stage, card, config)
        files = [path / CARD, *(path / weights_name(stage) for stage in card["stages"])]
        return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()


@in_float32
def load_model(cls: type[Model], path: Path) -> Model:
    """Load a model with all its stages; see :meth:`TwoStageVARST.load`."""
    path = local_directory(path)
    with _shared_lock(path):
        card = read_card(path)
        if 1 not in card["stages"]:
            raise ValueError(
                f"path: {str(path)!r} holds stage 2 alone; load it with load_stage into a model that has its stage 1"
            )
        extra = [weights_name(s) for s in {1, 2} - {*card["stages"]} if (path / weights_name(s)).exists()]
        if extra:
            raise ValueError(
                f"path: {str(path)!r} holds {extra[0]}, but its card has stages {card['stages']}; remove that file if "
                "it belongs to another model"
            )
        config = _config(card, path)
        states = {stage: _read_stage(path, stage, card, config) for stage in card["stages"]}
    model = cls(config if 2 in states else config.replace(embedding_dims=()))
    for stage, state in states.items():
        load_state(model.stage1 if stage == 1 else model.var_stage, state, path / weights_name(stage))
    model.registry = card["registry"]
    model.history = {name: _table(values) for name, values in card.get("history", {}).items()}
    return model.eval().requires_grad_(False)


@in_float32
def load_stage(model: TwoStageNetwork, path: Path, stage: Literal[1, 2]) -> None:
    """Load one stage into a model; see :meth:`TwoStageVARST.load_stage`."""
    path = local_directory(path)
    with _shared_lock(path):
        card = read_card(path)
        if stage not in card["stages"]:
            raise ValueError(f"path: {str(path)!r} holds stages {card['stages']}, not stage {stage}")
        theirs, ours = card["registry"].get("genes"), model.registry.get("genes")
        if theirs and ours and theirs != ours:
            raise ValueError(
                f"path: the genes of {str(path)!r} ({theirs[:3]}, ...) are not the model's ({ours[:3]}, ...)"
            )
        config = _config(card, path)
        stage2_is_trained = "use_rep" in (model.registry if stage == 1 else card["registry"])
        card_fingerprint = card.get("stage1_fingerprint")  # not in cards of the first format
        if (
            stage2_is_trained
            and card_fingerprint is not None
            and card_fingerprint != fingerprint(model.stage1.state_dict())
        ):
            raise ValueError(
                f"path: {str(path)!r} has a different stage 1 than this model, and a stage 2 only understands the "
                "tokens of the stage 1 it was trained with; load both with TwoStageVARST.load, or train stage 2 again"
            )
        model.check_stage1(config)
        state = _read_stage(path, stage, card, config)
    if stage == 1:
        keys: tuple[str, ...] = tuple(k for k in OF_STAGE1 if k != "library_key")
    else:
        model.add_stage2(config)
        keys = tuple(k for k in card["registry"] if k not in OF_STAGE1 or k == "library_key")
    load_state(model.stage1 if stage == 1 else model.var_stage, state, path / weights_name(stage))
    for name in AFTER_TRAINING if stage == 2 else ():
        model.registry.pop(name, None)
    model.registry.update({k: card["registry"][k] for k in keys if k in card["registry"]})
    model.eval()
