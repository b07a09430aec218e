"""The weights of a saved model: safetensors, checked before any module is built. Nothing is ever unpickled.

A file is compared with the card first by its SHA-256, then by its header: names, shapes and types of all tensors
against those that the configuration implies. These are counted on PyTorch's meta device, which holds no values, so that
a card that asks for a huge model is refused at the cost of reading it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

from .config import ModelConfig
from .var_stage import VARStage
from .vqvae import MultiScaleGeneVQVAE

# safetensors' names of the types that models have.
DTYPES = {"F32": torch.float32, "I64": torch.int64, "BOOL": torch.bool}
# A module with its buffers, over its file: tables that are not saved, and tensors that earlier formats lacked.
MOST_MEMORY, SPARE_BYTES = 4, 2**26
HASHED_AT_ONCE = 2**20
# In models of formats up to 6: whether sections are standardised by their own statistics.
OWN_STATISTICS = "condition.own_statistics"


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Fingerprint of a module's weights and buffers, given its state dict."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, read a megabyte at a time."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def check_digest(file: Path, digest: str) -> None:
    """Refuse a file of weights that is not the one that the card names.

    Raises
    ------
    FileNotFoundError
        If it is missing.
    ValueError
        If its SHA-256 is another.
    """
    if not file.is_file():
        raise FileNotFoundError(f"path: {str(file.parent)!r} lacks {file.name}; save the model again")
    if file_digest(file) != digest:
        raise ValueError(
            f"path: {str(file)!r} is truncated or damaged, or belongs to another model (its SHA-256 is not the "
            "card's); save the model again"
        )


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are NaN or infinite.

    Raises
    ------
    ValueError
        Naming the first such tensor.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{what}: {name} holds values that are not finite; train the model again")


def read_weights(file: Path, stage: int, config: ModelConfig, version: int) -> dict[str, Tensor]:
    """Read a stage's weights, once it is known that they are those of a configuration.

    Parameters
    ----------
    file
        The safetensors file.
    stage
        1 or 2.
    config
        The model's configuration.
    version
        Format of the model, for what earlier ones named otherwise.

    Returns
    -------
    dict of Tensor
        The state dict of the stage's module.

    Raises
    ------
    FileNotFoundError
        If the file is missing.
    ValueError
        If it is damaged, does not fit the configuration, or holds values that are not finite or out of range.
    """
    if not file.is_file():
        raise FileNotFoundError(f"path: {str(file.parent)!r} lacks {file.name}; save the model again")
    where = f"path: {str(file)!r}"
    try:
        header = _read_header(file)
        _check_counts(header, stage, config, where)
        n_measured = _n_measured(header)
        implied, n_bytes = _implied(stage, config, n_measured)
        if n_bytes > MOST_MEMORY * file.stat().st_size + SPARE_BYTES:
            raise ValueError(f"{where} does not fit the configuration: it is far smaller than the model would be")
        _compare(_from_older(header, implied, stage, version), implied, where)
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{where} is truncated or damaged ({error}); save the model again") from None
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"{where} does not fit the configuration ({str(error).splitlines()[0]})") from None
    # What an earlier format did not have starts as in a new module.
    state = _from_older(state, implied, stage, version)
    missing = [name for name, tensor in state.items() if tensor.is_meta]
    if missing:
        fresh = _module(stage, config, n_measured).state_dict()
        state |= {name: fresh[name] for name in missing}
    check_finite(state, where)
    _check_indices(state, stage, config, where)
    return state


def load_state(module: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Give a module the weights that :func:`read_weights` read.

    Raises
    ------
    ValueError
        If they do not fit.
    """
    if isinstance(module, VARStage):
        n_measured = _n_measured(state)
        module.adaptation = None
        if n_measured is not None:
            module.add_adaptation(n_measured)
    try:
        module.load_state_dict(state)
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"path: {str(file)!r} does not fit the configuration ({reason})") from None


def _module(stage: int, config: ModelConfig, n_measured: int | None) -> nn.Module:
    if stage == 1:
        return MultiScaleGeneVQVAE(config)
    module = VARStage(config)
    if n_measured is not None:
        module.add_adaptation(n_measured)
    return module


def _n_measured(state: Mapping[str, Tensor]) -> int | None:
    """Of an adapted stage 2, the measured spots that it holds; None of others."""
    place = state.get("adaptation.place")
    return None if place is None or place.ndim != 2 else len(place)


def _read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, without values."""
    header: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            part = tensors.get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise ValueError(f"path: {str(file)!r} does not fit the configuration: {name} is {part.get_dtype()}")
            header[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return header


def _check_counts(header: Mapping[str, Tensor], stage: int, config: ModelConfig, where: str) -> None:
    """Refuse a configuration of more parts than the file has tensors, or of more genes, before any is built."""
    parts = {"scales": len(config.scales), "embedding_dims": len(config.source_dims) if stage == 2 else 0}
    if stage == 2:
        parts["n_layers"] = config.n_layers
    for name, number in parts.items():
        if number > len(header):
            raise ValueError(f"{where} does not fit the configuration: {name} asks for {number} parts")
    per_token = "scales.mean" if stage == 1 else "transformer.parents"
    rows = config.n_genes if stage == 1 else config.n_tokens
    if per_token not in header or header[per_token].shape != (rows,):
        found = tuple(header[per_token].shape) if per_token in header else "absent"
        raise ValueError(f"{where} does not fit the configuration: {per_token} is {found}, not ({rows},)")


def _implied(stage: int, config: ModelConfig, n_measured: int | None) -> tuple[dict[str, Tensor], int]:
    """Tensors of a stage's module, without values, and how many bytes it takes with those that are not saved."""
    with torch.device("meta"):
        module = _module(stage, config, n_measured)
    tensors = [*module.parameters(), *module.buffers()]
    return module.state_dict(), sum(t.numel() * t.element_size() for t in tensors)


def _compare(found: Mapping[str, Tensor], implied: Mapping[str, Tensor], where: str) -> None:
    names = sorted(set(found) ^ set(implied))
    if names:
        state = "lacks" if names[0] in implied else "has an unknown tensor"
        raise ValueError(f"{where} does not fit the configuration: it {state} {names[0][:80]!r}")
    for name, tensor in implied.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise ValueError(
                f"{where} does not fit the configuration: {name} is {tuple(found[name].shape)} of {found[name].dtype}, "
                f"not {tuple(tensor.shape)} of {tensor.dtype}"
            )


def _from_older(state: dict[str, Tensor], implied: Mapping[str, Tensor], stage: int, version: int) -> dict[str, Tensor]:
    """Weights of stage 2 as the present format has them; without values where an earlier one had none.

    In format 1 there was no spread, no depth among the prior's outputs and no calibration. The first models of format 2
    always standardised sections by their own statistics, if the configuration says so. Up to format 3 the cross-fitted
    members of the prior predicted new spots, too, and had no linear part. Up to format 4 targets were
    softened. Up to format 6 sources were standardised by one of two statistics, and depth was an output of the members.
    """
    if stage == 1:
        return state
    if version == 1:
        for name in ("prior.output.weight", "prior.output.bias"):
            if name in state:
                state[name] = pad(state[name], (0, 1))
        state = {name: t for name, t in implied.items() if not name.startswith("prior.")} | state
    if version <= 2:
        state = {name: t for name, t in implied.items() if name == "condition.own_statistics"} | state
    if version <= 3:
        state |= {name: torch.cat([t, t]) for name, t in state.items() if name.startswith("prior.")}
    if version <= 4:
        state = {name: t for name, t in state.items() if not name.startswith("head.softened_")}
    if version <= 6:
        state = {name: t for name, t in state.items() if name != OWN_STATISTICS}
        for name, tensor in state.items():
            if name.startswith("condition.projection_"):
                state[name] = tensor[None]
            elif name.startswith(("prior.output.", "prior.linear.")) and name != "prior.linear.share":
                state[name] = tensor[..., :-1].contiguous()
        for part in ("layers", "norms", "output"):
            state = {name.replace(f"prior.{part}.", f"prior.genes.{part}."): t for name, t in state.items()}
        new: tuple[str, ...] = ("observation.", "prior.depth", "prior.linear_depth.", "prior.trained")
        new += ("prior.linear.",) if version <= 3 else ()
        state |= {name: tensor for name, tensor in implied.items() if name.startswith(new)}
    return state


def with_statistics(config: ModelConfig, file: Path, version: int) -> ModelConfig:
    """The configuration of a stage 2 that, up to format 6, chose by which statistics to standardise when trained."""
    if version > 6 or config.standardize != "auto" or config.condition != "pca" or not file.is_file():
        return config
    try:
        with safe_open(file, framework="pt") as tensors:
            own = OWN_STATISTICS not in tensors.keys() or bool(tensors.get_tensor(OWN_STATISTICS).all())
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"path: {str(file)!r} is truncated or damaged ({error}); save the model again") from None
    return config.replace(standardize="section" if own else "training")


def _check_indices(state: Mapping[str, Tensor], stage: int, config: ModelConfig, where: str) -> None:
    """Refuse numbers of groups and tokens that there are not."""
    if stage == 1:
        name, tensor, low = "scales.groups", state["scales.groups"], 0
        high = tensor.new_tensor(config.scales)[:, None]
    else:
        name, tensor, low = "transformer.parents", state["transformer.parents"], -1
        coarser = tensor.new_tensor([0, *config.scales[:-1]])
        high = coarser.repeat_interleave(tensor.new_tensor(config.scales))
        if "prior.trained" in state and int(state["prior.trained"][1]) < 1:
            raise ValueError(f"{where}: prior.trained holds numbers out of range; save the model again")
    if bool(((tensor < low) | (tensor >= high)).any()):
        raise ValueError(f"{where}: {name} holds numbers out of range; save the model again")
