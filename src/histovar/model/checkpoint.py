"""Save and load models: a directory with a card (JSON), the weights of each stage (safetensors) and a README.md.

The card is what counts. New weights are written beside the old ones under hidden names, then the card is renamed into
place, then the weights; a card names its weights by their SHA-256, and whoever reads it looks for them under both
names. So a process that is killed at any moment leaves the old model or the new one, whole, and other files in the
directory are never touched.
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
from .weights import check_digest, check_finite, file_digest, fingerprint, load_state, read_weights, with_statistics

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=TwoStageNetwork)

# Seconds to wait for another process that saves to the same directory.
SAVING_SECONDS, LOADING_SECONDS = 600.0, 60.0
# What a save that was killed may leave in a model's directory.
LEFTOVERS = re.compile(
    r"\.stage[12]-[0-9a-f]{16}\.safetensors|\.\.stage[12]-.*\.tmp.*|\.(?:model\.json|README\.md)\..*\.tmp.*"
)

__all__ = ["load_model", "load_stage", "read_card", "save_model", "verify"]


def save_model(model: TwoStageNetwork, path: Path, stages: Sequence[int] = (1, 2)) -> None:
    """Write a model, or one stage of it, to a directory; in a distributed run, the first process does.

    Parameters
    ----------
    model
        The model.
    path
        Directory, made if absent. A model there is replaced; other files stay.
    stages
        Which stages to write; those the model does not have are left out. Of one stage alone, the other stage of the
        model that is there is kept, if both belong to the same stage 1.

    Raises
    ------
    NotADirectoryError
        If there is a file of that name.
    ValueError
        If the model has weights that are not finite or a registry that is not plain, or if the directory holds a
        ``model.json`` of something else, or another stage that does not belong to this one. Nothing is then written.
    OSError
        If the disk is full or writing is refused. The earlier model is then as it was.
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
            card = _with_other_stage(card, path, stages[0])
        elif not _is_replaceable(path / CARD):
            raise ValueError(
                f"path: {str(path / CARD)!r} was not written by histovar; save to another directory, or remove it"
            )
        if locked:
            _finish_interrupted(path)
        try:
            for stage, content in contents.items():
                with atomic_file(_hidden(path, stage, weights[stage])) as file:
                    file.write_bytes(content)
            with atomic_file(path / CARD) as file:
                file.write_text(card_text(card))
        except OSError:
            if locked:
                _finish_interrupted(path)  # a full disk has no room for what is not used
            raise
        for stage in contents:
            # Without a lock another process may have saved meanwhile, and found leftovers.
            if _hidden(path, stage, weights[stage]).exists():
                os.replace(_hidden(path, stage, weights[stage]), path / weights_name(stage))
        for stage in {1, 2} - {*card["stages"]}:
            (path / weights_name(stage)).unlink(missing_ok=True)
        _write_readme(path, card)
        flush_directory(path)


def _write_readme(path: Path, card: Mapping[str, Any]) -> None:
    """Describe the model that the directory holds; what else a README.md says, or one of something else, stays."""
    file = path / FILE
    try:
        earlier = file.read_text("utf-8") if file.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("%s: it cannot be read (%s), and stays as it is", FILE, error)
        return
    history = {name: _table(values) for name, values in card["history"].items()}
    text = readme(card["registry"], ModelConfig.from_json(json.dumps(card["config"])), history, earlier)
    if text is None:
        logger.warning(
            "%s: the marks between which histovar describes the model are missing or damaged, so that it stays as it "
            "is and may be out of date; delete it, or rename it, for a new one",
            FILE,
        )
    elif text != earlier:
        with atomic_file(file) as written:
            written.write_text(text, "utf-8")


def _hidden(path: Path, stage: int, digest: str) -> Path:
    """Where a stage's weights are until the card names them."""
    return path / f".stage{stage}-{digest[:16]}.safetensors"


def _weights_file(path: Path, stage: int, card: Mapping[str, Any]) -> Path:
    """Where the weights are that a card names."""
    if card["format_version"] >= CHECKSUMS_SINCE:
        hidden = _hidden(path, stage, card["weights"][weights_name(stage)])
        if hidden.is_file():
            return hidden
    return path / weights_name(stage)


def _is_replaceable(file: Path) -> bool:
    """Whether a card, which may be truncated, is histovar's."""
    if not file.is_file():
        return not file.exists()
    with file.open("rb") as stream:
        start = stream.read(4096)
    return not start or f'"{FORMAT}"'.encode() in start or b'"format": "'.startswith(start.strip(b"{ \n"))


def _finish_interrupted(path: Path) -> None:
    """Give the weights of an interrupted save their names, and remove what it left; the directory is locked."""
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


def _with_other_stage(card: dict[str, Any], path: Path, stage: int) -> dict[str, Any]:
    """Join the card of one stage with that of the other, which the directory holds.

    Raises
    ------
    ValueError
        If they do not belong together, or cannot be compared.
    """
    if not (path / CARD).exists():
        return card
    mend = "save to another directory, or the whole model with save()"
    try:
        there = read_card(path)
    except ValueError as error:
        raise ValueError(f"{error}; or {mend}") from None
    other = 3 - stage
    if other not in there["stages"]:
        return card
    if there["format_version"] < FORMAT_VERSION:
        raise ValueError(
            f"path: {str(path)!r} holds stage {other} in format {there['format_version']}, beside which stage {stage} "
            f"cannot be saved; {mend}"
        )
    if there["stage1_fingerprint"] != card["stage1_fingerprint"]:
        raise ValueError(
            f"path: {str(path)!r} holds stage {other} of another model, whose stage 1 is not this one's: the two do "
            f"not belong together; {mend}"
        )
    check_digest(_weights_file(path, other, there), there["weights"][weights_name(other)])
    cards = {stage: card, other: there}
    registry = {
        name: cards[s]["registry"][name]
        for s, names in ((1, OF_STAGE1), (2, (*OF_STAGE2, *AFTER_TRAINING)))
        for name in names
        if name in cards[s]["registry"]
    }
    described = [cards[s]["registry"].get(DESCRIPTION) for s in (other, stage)]
    if any(said is not None for said in described):
        registry[DESCRIPTION] = {name: text for said in described for name, text in (said or {}).items()}
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
    """The configuration in the present format."""
    config = ModelConfig.from_json(json.dumps(card["config"]))
    if 2 not in card["stages"]:
        return config
    return with_statistics(config, _weights_file(path, 2, card), card["format_version"])


def _table(values: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(values["data"], values["index"], values["columns"], dtype=float)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Wait for a process that is saving to the directory, if there is one."""
    if not path.is_dir():
        yield
        return
    with directory_lock(path, seconds=LOADING_SECONDS, shared=True):
        yield


def _read_stage(path: Path, stage: int, card: Mapping[str, Any], config: ModelConfig) -> dict[str, Tensor]:
    """Weights of a stage, verified."""
    file = _weights_file(path, stage, card)
    if card["format_version"] >= CHECKSUMS_SINCE:
        check_digest(file, card["weights"][weights_name(stage)])
    state = read_weights(file, stage, config, card["format_version"])
    expected = card.get("stage1_fingerprint")  # not in cards of the first format
    if stage == 1 and expected is not None and fingerprint(state) != expected:
        raise ValueError(f"path: {str(file)!r} holds another stage 1 than its card says; save the model again")
    return state


@in_float32
def verify(path: Path) -> str:
    """Check that a saved model is whole: its card, and that the weights are those it was saved with.

    Weights of formats before 6, which have no checksums, are only compared with the configuration.

    Parameters
    ----------
    path
        Directory of the model.

    Returns
    -------
    str
        SHA-256 of the model, the same for the same card and weights.

    Raises
    ------
    FileNotFoundError
        If the directory or a file is missing.
    ValueError
        If the card or the weights are damaged, changed or do not belong together.
    """
    path = local_directory(path)
    with _reading(path):
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
    """Read a whole model; see :meth:`TwoStageVARST.load`."""
    path = local_directory(path)
    with _reading(path):
        card = read_card(path)
        if 1 not in card["stages"]:
            raise ValueError(f"path: {str(path)!r} holds stage 2 alone; use load_stage on a model with its stage 1")
        extra = [weights_name(s) for s in {1, 2} - {*card["stages"]} if (path / weights_name(s)).exists()]
        if extra:
            raise ValueError(
                f"path: {str(path)!r} holds {extra[0]}, but its card has stages {card['stages']}; remove that file if "
                "it is of another model"
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
    """Take one stage from a directory; see :meth:`TwoStageVARST.load_stage`."""
    path = local_directory(path)
    with _reading(path):
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
        of_card = card.get("stage1_fingerprint")  # not in cards of the first format
        if stage2_is_trained and of_card is not None and of_card != fingerprint(model.stage1.state_dict()):
            raise ValueError(
                f"path: {str(path)!r} has another stage 1 than this model, and a stage 2 knows the tokens of that "
                "stage 1 alone that it was trained with; load both with TwoStageVARST.load, or train stage 2 again"
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
