"""Read the weights of a saved model from safetensors, validated before any module is built; nothing is unpickled.

A file is compared with the card first by its SHA-256, then by its header: names, shapes and types of all tensors must
be those that the configuration implies. The latter come from a module on PyTorch's meta device, which allocates no
memory, so that a card that asks for a huge model is refused without building it.
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

# Data types of tensors in models, by their names in safetensors.
DTYPES = {"F32": torch.float32, "I64": torch.int64, "BOOL": torch.bool}
# A module may take up to MOST_MEMORY times the bytes of its file plus SPARE_BYTES, for buffers that are not saved and
# tensors that earlier formats lacked.
MOST_MEMORY, SPARE_BYTES = 4, 2**26
# Bytes that are hashed at once.
HASHED_AT_ONCE = 2**20
# In models of formats up to 6, a buffer that says whether sections are standardised by their own statistics.
OWN_STATISTICS = "condition.own_statistics"


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hash a state dict, names and values, to a fingerprint of the module."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def check_digest(file: Path, digest: str) -> None:
    """Refuse a weights file whose SHA-256 is not the one in the card.

    Raises
    ------
    FileNotFoundError
        If it is missing.
    ValueError
        If its SHA-256 differs.
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
    """Read the weights of a stage, validated against the model's configuration.

    Parameters
    ----------
    file
        The safetensors file.
    stage
        1 or 2.
    config
        The model's configuration.
    version
        Format version of the saved model.

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
        implied, n_bytes = _implied_tensors(stage, config, n_measured)
        if n_bytes > MOST_MEMORY * file.stat().st_size + SPARE_BYTES:
            raise ValueError(f"{where} does not fit the configuration: it is far smaller than that model would be")
        _compare(_upgrade(header, implied, stage, version), implied, where)
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{where} is truncated or damaged ({error}); save the model again") from None
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"{where} does not fit the configuration ({str(error).splitlines()[0]})") from None
    # Tensors that an earlier format did not have are initialised as in a new module.
    state = _upgrade(state, implied, stage, version)
    missing = [name for name, tensor in state.items() if tensor.is_meta]
    if missing:
        fresh = _module(stage, config, n_measured).state_dict()
        state |= {name: fresh[name] for name in missing}
    check_finite(state, where)
    _check_indices(state, stage, config, where)
    return state


def load_state(module: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Load weights from :func:`read_weights` into a module.

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
    """Build the module of a stage; `n_measured` spots are those of an adapted stage 2."""
    if stage == 1:
        return MultiScaleGeneVQVAE(config)
    module = VARStage(config)
    if n_measured is not None:
        module.add_adaptation(n_measured)
    return module


def _n_measured(state: Mapping[str, Tensor]) -> int | None:
    """Number of measured spots of an adapted stage 2; None for other modules."""
    place = state.get("adaptation.place")
    return None if place is None or place.ndim != 2 else len(place)


def _read_header(file: Path) -> dict[str, Tensor]:
    """Read names, shapes and types of the tensors in a file, as tensors without values."""
    header: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            entry = tensors.get_slice(name)
            dtype = DTYPES.get(entry.get_dtype())
            if dtype is None:
                raise ValueError(f"path: {str(file)!r} does not fit the configuration: {name} is {entry.get_dtype()}")
            header[name] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
    return header


def _check_counts(header: Mapping[str, Tensor], stage: int, config: ModelConfig, where: str) -> None:
    """Refuse a configuration that asks for more modules, genes or tokens than the file holds, before building any."""
    n_modules = {"scales": len(config.scales), "embedding_dims": len(config.source_dims) if stage == 2 else 0}
    if stage == 2:
        n_modules["n_layers"] = config.n_layers
    for name, number in n_modules.items():
        if number > len(header):
            raise ValueError(f"{where} does not fit the configuration: {name} asks for {number} modules")
    per_token = "scales.mean" if stage == 1 else "transformer.parents"
    rows = config.n_genes if stage == 1 else config.n_tokens
    if per_token not in header or header[per_token].shape != (rows,):
        shape = tuple(header[per_token].shape) if per_token in header else "absent"
        raise ValueError(f"{where} does not fit the configuration: {per_token} is {shape}, not ({rows},)")


def _implied_tensors(stage: int, config: ModelConfig, n_measured: int | None) -> tuple[dict[str, Tensor], int]:
    """State dict that a configuration implies, without values, and the bytes of the module with unsaved buffers."""
    with torch.device("meta"):
        module = _module(stage, config, n_measured)
    tensors = [*module.parameters(), *module.buffers()]
    return module.state_dict(), sum(t.numel() * t.element_size() for t in tensors)


def _compare(header: Mapping[str, Tensor], implied: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors whose names, shapes or types differ from those that the configuration implies."""
    names = sorted(set(header) ^ set(implied))
    if names:
        problem = "lacks" if names[0] in implied else "has an unknown tensor"
        raise ValueError(f"{where} does not fit the configuration: it {problem} {names[0][:80]!r}")
    for name, tensor in implied.items():
        stored = header[name]
        if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
            raise ValueError(
                f"{where} does not fit the configuration: {name} is {tuple(stored.shape)} of {stored.dtype}, "
                f"not {tuple(tensor.shape)} of {tensor.dtype}"
            )


def _upgrade(state: dict[str, Tensor], implied: Mapping[str, Tensor], stage: int, version: int) -> dict[str, Tensor]:
    """Convert the weights of an earlier format to the present one; tensors that it did not have get no values.

    Format 1 had no spread, no depth among the prior's outputs and no calibration. The first models of format 2
    always standardised sections by their own statistics, if the configuration says so. Up to format 3, the prior's
    cross-fitted members predicted new spots, too, and had no linear part. Up to format 4, targets were softened. Up to
    format 6, sources were standardised by one of two statistics only, and depth was an output of the members.
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


def complete_standardize(config: ModelConfig, file: Path, version: int) -> ModelConfig:
    """Set `standardize` in the configuration of a stage 2 that, up to format 6, chose it in training."""
    if version > 6 or config.standardize != "auto" or config.condition != "pca" or not file.is_file():
        return config
    try:
        with safe_open(file, framework="pt") as tensors:
            own = OWN_STATISTICS not in tensors.keys() or bool(tensors.get_tensor(OWN_STATISTICS).all())
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"path: {str(file)!r} is truncated or damaged ({error}); save the model again") from None
    return config.replace(standardize="section" if own else "training")


def _check_indices(state: Mapping[str, Tensor], stage: int, config: ModelConfig, where: str) -> None:
    """Refuse indices of groups and tokens that are out of range."""
    if stage == 1:
        name, tensor, low = "scales.groups", state["scales.groups"], 0
        high = tensor.new_tensor(config.scales)[:, None]
    else:
        name, tensor, low = "transformer.parents", state["transformer.parents"], -1
        coarser = tensor.new_tensor([0, *config.scales[:-1]])
        high = coarser.repeat_interleave(tensor.new_tensor(config.scales))
        if "prior.trained" in state and int(state["prior.trained"][1]) < 1:
            raise ValueError(f"{where}: prior.trained holds values out of range; save the model again")
    if bool(((tensor < low) | (tensor >= high)).any()):
        raise ValueError(f"{where}: {name} holds values out of range; save the model again")
