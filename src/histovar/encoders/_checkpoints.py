"""Load an encoder's weights from the hub or a file into its architecture."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from histovar._extras import import_extra

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .encoder import Encoder

# Layers of a checkpoint for classification, and a token for training; embeddings need neither.
DROPPED = re.compile(r"^(head|head_dist|fc_norm)\.|(^|\.)mask_token$")
TRUNK = "visual.trunk."
# Names under which timm looks for weights in a repository.
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# Names of DINOv2's layers in transformers, and those in timm; the first pattern that matches is used.
FROM_TRANSFORMERS = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
)
QUERY = re.compile(r"^encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)$")

State = dict[str, "torch.Tensor"]


def conch_trunk(state: State) -> State:
    """Take the image encoder from a checkpoint of CONCH, without its text encoder."""
    return {key.removeprefix(TRUNK): value for key, value in state.items() if key.startswith(TRUNK)}


def from_transformers(state: State) -> State:
    """Convert a checkpoint of DINOv2 in transformers to timm's names, with query, key and value in one tensor."""
    import torch

    converted = {}
    for key, value in state.items():
        query = QUERY.match(key)
        if query:
            tensors = [state[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            converted[f"blocks.{query[1]}.attn.qkv.{query[2]}"] = torch.cat(tensors)
        elif ".attention.attention." not in key:
            pattern, name = next((rule for rule in FROM_TRANSFORMERS if re.search(rule[0], key)), ("^", ""))
            converted[re.sub(pattern, name, key, count=1)] = value
    return converted


def import_timm() -> ModuleType:
    """Import timm.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed.
    """
    import histovar._torchvision  # noqa: F401  # timm imports torchvision

    return import_extra("timm", "embed", "embedding of images")


def architecture(encoder: Encoder) -> nn.Module:
    """Build the architecture of an encoder, with random weights."""
    timm = import_timm()
    options = dict(encoder.options)
    if "mlp_layer" in options:
        options["mlp_layer"] = getattr(timm.layers, options["mlp_layer"])
    module: nn.Module = timm.create_model(encoder.architecture, pretrained=False, num_classes=0, **options)
    return module


def load(encoder: Encoder, weights: Path | None) -> nn.Module:
    """Build an encoder with its weights, in evaluation mode.

    Parameters
    ----------
    encoder
        The encoder.
    weights
        A checkpoint file; None for the hub, or for a module, which has its weights already.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the checkpoint is not of this architecture.
    PermissionError
        If the weights are gated.
    ConnectionError
        If the weights cannot be downloaded.
    """
    if encoder.module is not None:
        if weights is not None:
            raise ValueError("weights: the encoder is a module, which has its weights already; leave weights out")
        module: nn.Module = encoder.module
        return module
    state = _from_hub(encoder) if weights is None else _from_file(weights)
    module = architecture(encoder)  # random weights
    source = f"the hub's {encoder.hub}" if weights is None else repr(str(weights))
    try:
        _fill(module, state if encoder.convert is None else encoder.convert(state))
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"weights: {source} is not a checkpoint of {encoder.name} ({reason})") from None
    return module.eval()


def _fill(module: nn.Module, state: State) -> None:
    vision_transformer = import_timm().models.vision_transformer
    if isinstance(module, vision_transformer.VisionTransformer):  # interpolates position embeddings to the input's size
        state = vision_transformer.checkpoint_filter_fn(state, module)
    module.load_state_dict({key: value for key, value in state.items() if not DROPPED.search(key)})


def _from_file(path: Path) -> State:
    models = import_timm().models
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {str(path)!r}")
    try:
        state: State = models.load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (pickle and safetensors raise errors of many classes)
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"weights: {str(path)!r} cannot be read as a checkpoint ({reason})") from None
    return state


def _from_hub(encoder: Encoder) -> State:
    models = import_timm().models
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    if not encoder.hub:
        raise ValueError(f"weights: encoder {encoder.name!r} has no repository; pass weights=, a checkpoint file")
    page = f"https://huggingface.co/{encoder.hub}"
    alternative = "or pass weights=, a checkpoint file that you have"
    cached = any(isinstance(try_to_load_from_cache(encoder.hub, name), str) for name in WEIGHTS_FILES)
    try:
        if not cached:  # without a network this fails at once, while the download would retry for long
            HfApi().model_info(encoder.hub, timeout=10)
        state: State = models.load_state_dict_from_hf(encoder.hub, weights_only=True)
    except Exception as error:  # noqa: BLE001 (the hub raises errors of many libraries, some wrapped in others)
        causes = _causes(error)
        if any(isinstance(cause, errors.GatedRepoError | errors.RepositoryNotFoundError) for cause in causes):
            raise PermissionError(
                f"encoder: you have no access to the weights of {encoder.name!r} (gated: {encoder.gated}); request "
                f"access on {page} and log in with 'hf auth login', {alternative}"
            ) from None
        reason = " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
        raise ConnectionError(
            f"encoder: the weights of {encoder.name!r} cannot be downloaded from {page} "
            f"({reason}); try again with a network, {alternative}"
        ) from None
    return state


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes
