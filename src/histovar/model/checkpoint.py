"""Models on disk: safetensors for weights, JSON for the rest. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from histovar._torch_state import in_float32
from histovar._version import __version__

from .config import ModelConfig
from .distributed import rank_and_world

if TYPE_CHECKING:
    from .two_stage import TwoStageVARST

Model = TypeVar("Model", bound="TwoStageVARST")

FORMAT = "histovar"
FORMAT_VERSION = 5
CARD = "model.json"


def _weights(stage: int) -> str:
    return f"stage{stage}.safetensors"


def fingerprint(module: nn.Module) -> str:
    """Fingerprint of a module's weights and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(model: TwoStageVARST, path: Path, stages: Sequence[int] = (1, 2)) -> None:
    """Write a model, or one stage of it, to a directory; in a distributed run, the first process does.

    Parameters
    ----------
    model
        The model.
    path
        Directory, made if absent.
    stages
        Which stages to write; those the model does not have are left out.
    """
    if rank_and_world()[0]:
        return
    path.mkdir(parents=True, exist_ok=True)
    modules = {1: model.stage1, 2: model.stage2}
    written = [s for s in stages if modules[s] is not None]
    card = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "stages": written,
        "stage1_fingerprint": fingerprint(model.stage1),
        "config": json.loads(model.config.to_json()),
        "registry": model.registry,
        "history": {k: json.loads(v.to_json(orient="split")) for k, v in model.history.items()},
    }
    for stage in written:
        module = modules[stage]
        if module is not None:
            state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
            save_file(state, path / _weights(stage))
    (path / CARD).write_text(json.dumps(card, indent=2))


def read_card(path: Path) -> dict[str, Any]:
    """What a saved model says of itself.

    Raises
    ------
    FileNotFoundError
        If the directory or its card is missing.
    ValueError
        If the card is not histovar's, or of a newer format.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"path: no model directory at {str(path)!r}; write one with model.save(...)")
    file = path / CARD
    if not file.is_file():
        raise FileNotFoundError(f"path: {str(path)!r} is not a saved model, it has no {CARD}")
    try:
        card = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"path: {str(file)!r} is truncated or not JSON ({error}); save the model again") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError(f"path: {str(file)!r} does not describe a histovar model")
    if card.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"path: {str(path)!r} has format {card['format_version']}, written by histovar {card.get('version')}; "
            f"this version reads up to {FORMAT_VERSION}: upgrade histovar"
        )
    if card["format_version"] == 1:
        # Then sources were standardised by training's statistics, which the projection held.
        card["config"]["standardize"] = "training"
    if card["format_version"] <= 2:
        # Then every scale attended to itself.
        card["config"]["attention_limit"] = card["config"]["n_genes"]
    if card["format_version"] <= 3:
        card["config"]["outline"] = False
    if card["format_version"] <= 4:
        # Then targets could be softened, which concerned training alone.
        del card["config"]["softening"]
    return card


def _from_older(state: dict[str, Tensor], wanted: dict[str, Tensor], version: int) -> dict[str, Tensor]:
    """Weights of stage 2 as older formats had them.

    In format 1 there was no spread, no depth among the prior's outputs and no calibration. Up to format 3 the
    cross-fitted members of the prior predicted new spots, too, and had no linear part. Up to format 4 targets were
    softened.
    """
    if version == 1:
        for name in ("prior.output.weight", "prior.output.bias"):
            if name in state:
                state[name] = pad(state[name], (0, 1))
        state = {name: t for name, t in wanted.items() if not name.startswith("prior.")} | state
    if version <= 3:
        state |= {name: torch.cat([t, t]) for name, t in state.items() if name.startswith("prior.")}
        state |= {name: t for name, t in wanted.items() if name.startswith("prior.linear.")}
    return {name: t for name, t in state.items() if not name.startswith("head.softened_")}


def _load_weights(module: Any, path: Path, stage: int, version: int) -> None:
    file = path / _weights(stage)
    if not file.is_file():
        raise FileNotFoundError(f"path: {str(path)!r} lacks {file.name}; save the model again")
    try:
        state = load_file(file)
        if stage == 2:
            state = _from_older(state, module.state_dict(), version)
        module.load_state_dict(state)
    except SafetensorError as error:
        raise ValueError(f"path: {str(file)!r} is truncated or damaged ({error}); save the model again") from None
    except RuntimeError as error:
        raise ValueError(f"path: {str(file)!r} does not fit the configuration ({error})") from None


@in_float32
def load_model(cls: type[Model], path: Path) -> Model:
    """Read a whole model; see :meth:`TwoStageVARST.load`."""
    card = read_card(path)
    config = ModelConfig.from_json(json.dumps(card["config"]))
    if 1 not in card["stages"]:
        raise ValueError(f"path: {str(path)!r} holds stage 2 alone; use load_stage on a model with its stage 1")
    model = cls(config if 2 in card["stages"] else config.replace(embedding_dims=()))
    for stage in card["stages"]:
        _load_weights(model.stage1 if stage == 1 else model.stage2, path, stage, card["format_version"])
    model.registry = card["registry"]
    model.history = {
        k: pd.read_json(StringIO(json.dumps(v)), orient="split") for k, v in card.get("history", {}).items()
    }
    return model.eval().requires_grad_(False)


@in_float32
def load_stage(model: TwoStageVARST, path: Path, stage: Literal[1, 2]) -> None:
    """Take one stage from a directory; see :meth:`TwoStageVARST.load_stage`."""
    card = read_card(path)
    if stage not in card["stages"]:
        raise ValueError(f"path: {str(path)!r} holds stages {card['stages']}, not stage {stage}")
    theirs, ours = card["registry"].get("genes"), model.registry.get("genes")
    if theirs and ours and theirs != ours:
        raise ValueError(f"path: the genes of {str(path)!r} ({theirs[:3]}, ...) are not the model's ({ours[:3]}, ...)")
    config = ModelConfig.from_json(json.dumps(card["config"]))
    stage2_is_trained = "use_rep" in (model.registry if stage == 1 else card["registry"])
    of_card = card.get("stage1_fingerprint")  # not in cards of earlier versions
    if stage2_is_trained and of_card is not None and of_card != fingerprint(model.stage1):
        raise ValueError(
            f"path: {str(path)!r} has another stage 1 than this model, and a stage 2 knows the tokens of that stage 1 "
            "alone that it was trained with; load both with TwoStageVARST.load, or train stage 2 again"
        )
    of_stage1 = ("genes", "layer", "units", "normalization")
    if stage == 1:
        _load_weights(model.stage1, path, 1, card["format_version"])
        keys: tuple[str, ...] = of_stage1
    else:
        model.add_stage2(config)
        _load_weights(model.stage2, path, 2, card["format_version"])
        keys = tuple(k for k in card["registry"] if k not in of_stage1)
    model.registry.update({k: card["registry"][k] for k in keys if k in card["registry"]})
    model.eval()
