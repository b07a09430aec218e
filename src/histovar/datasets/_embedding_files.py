"""Find and read the file of a slide's embeddings (``.pt``, ``.h5``)."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# Names are compared in lower case. The first array with such a name and the shape of embeddings is read.
EMBEDDING_NAMES = ("embeddings", "embedding", "features", "feats")
COORDS_NAMES = ("coords", "coord", "coordinates", "coords_patching", "centroids", "positions", "pxl", "xy")
ID_NAMES = frozenset(
    {f"{noun}{s}" for noun in ("barcode", "spot", "cell", "id", "name") for s in ("", "s")}
    | {f"{noun}_{kind}{s}" for noun in ("spot", "cell") for kind in ("id", "name", "barcode") for s in ("", "s")}
    | {"obs_name", "obs_names", "index", "_index"}
)
# A slide's only file is refused if its path names another encoder: one of these, of any version.
ENCODER_FAMILIES = (
    *("conch", "ctranspath", "gigapath", "h0", "h-optimus", "hibou", "hoptimus", "kaiko", "lunit", "midnight", "musk"),
    *("phikon", "plip", "resnet", "titan", "uni", "virchow"),
)


@dataclass(frozen=True)
class EmbeddingFile:
    """Embeddings in a file, with the file's other arrays.

    Attributes
    ----------
    name
        Path of the file below the data set.
    values
        Embeddings, (n_rows, width).
    arrays
        Arrays of the file by name, including those that may hold ids or coordinates.
    is_tensor
        True if the file holds only a tensor, which must be in the slide's order.
    """

    name: str
    values: NDArray[np.float32]
    arrays: dict[str, NDArray[Any]]
    is_tensor: bool


def find_embedding_file(root: Path, slide: str, embedding: str, all_slides: Collection[str]) -> Path:
    """Find the file below `root` with a slide's embeddings by an encoder.

    The encoder's name must be a whole word of the path, not counting the slide's name. A slide's only file need not
    name the encoder, but must not name another one.
    """
    longer = [other for other in all_slides if other.startswith(f"{slide}_")]
    files = [
        file
        for kind in ("pt", "h5")
        for file in sorted(root.rglob(f"*.{kind}"))
        if _is_named_after(file.stem, slide) and not any(_is_named_after(file.stem, other) for other in longer)
    ]
    files = [file for file in files if file.is_file() and "patches" not in file.relative_to(root).parts]
    labels = {file: _path_without_slide(file.relative_to(root), slide, embedding) for file in files}
    # A letter, a digit or, as in v1.5, a point and a digit continue a name.
    whole_word = re.compile(rf"(?<![a-z0-9]){re.escape(embedding.lower())}(?![a-z0-9]|\.\d)")
    named = [file for file in files if whole_word.search(labels[file])]
    if not named and len(files) == 1:
        encoders = "|".join(map(re.escape, (*ENCODER_FAMILIES, embedding.lower())))
        if not re.search(rf"(?<![a-z0-9])({encoders})(?![a-z])", labels[files[0]]):
            named = files
            # Other words in the path may be the name of an encoder that is not listed here.
            level = logging.WARNING if re.search("[a-z]", labels[files[0]]) else logging.INFO
            path = files[0].relative_to(root)
            logger.log(level, "hest: the path of %s does not name the encoder: assumed to be %s", path, embedding)
    if not named:
        raise FileNotFoundError(
            f"embedding: no file of {embedding!r} embeddings of slide {slide!r} below {str(root)!r}; "
            f"files of this slide: {[str(file.relative_to(root)) for file in files]}"
        )
    if len(named) > 1:
        raise ValueError(
            f"embedding: several files fit slide {slide!r}: {[str(file.relative_to(root)) for file in named]}; "
            "give a longer name that only one of them has"
        )
    return named[0]


def _is_named_after(name: str, slide: str) -> bool:
    return name == slide or name.startswith(f"{slide}_")


def _path_without_slide(path: Path, slide: str, embedding: str) -> str:
    """Path in lower case without the slide's name, since that may contain an encoder's name."""
    folders = [folder for folder in path.parts[:-1] if folder != slide or slide.lower() == embedding.lower()]
    return "/".join([*folders, path.stem.removeprefix(slide)]).lower()


def read_embedding_file(file: Path, root: Path) -> EmbeddingFile:
    """Read embeddings, and arrays that may hold ids or coordinates, without unpickling.

    Raises
    ------
    ValueError
        If the file is damaged or holds no embeddings.
    """
    name = str(file.relative_to(root))
    is_tensor = False
    if file.suffix == ".h5":
        arrays, contents = _read_h5(file, name)
    else:
        stored = _load_pt(file, name)
        is_tensor = isinstance(stored, torch.Tensor)
        if not isinstance(stored, torch.Tensor | dict):
            raise ValueError(
                f"embedding: {name} holds a {type(stored).__name__}; "
                "save a tensor (n_spots, width), or a dictionary with 'embeddings' and 'barcodes'"
            )
        entries = stored if isinstance(stored, dict) else {EMBEDDING_NAMES[0]: stored}
        arrays, contents = {}, []
        for key, value in entries.items():
            array = _to_array(value)
            if array is None:
                contents.append(f"{key} ({type(value).__name__})")
            else:
                contents.append(describe_array(key, array))
                arrays[str(key)] = array
    return EmbeddingFile(name, _embeddings(arrays, contents, name), arrays, is_tensor)


def _read_h5(file: Path, name: str) -> tuple[dict[str, NDArray[Any]], list[str]]:
    arrays: dict[str, NDArray[Any]] = {}
    contents = []
    try:
        with h5py.File(file) as store:
            for key, item in store.items():
                is_array = isinstance(item, h5py.Dataset) and item.shape is not None
                contents.append(describe_array(key, item) if is_array else f"{key} ({type(item).__name__})")
                # Image patches, which the file may hold, too, are not read.
                if is_array and (
                    key.lower() in {*EMBEDDING_NAMES, *COORDS_NAMES, *ID_NAMES}
                    or h5py.check_string_dtype(item.dtype) is not None
                ):
                    arrays[key] = np.asarray(item[()])
    except MemoryError:
        raise
    except Exception as error:  # HDF5 raises errors of many types for damaged files
        reason = " ".join(str(error).split())
        raise ValueError(f"embedding: {name} cannot be read as HDF5 ({reason}); write it again") from error
    return arrays, contents


def _load_pt(file: Path, name: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch and the unpickler raise errors of many types for damaged files
        raise ValueError(
            f"embedding: {name} cannot be read by torch.load(weights_only=True): it is damaged or holds pickled "
            "objects; save a tensor, or a dictionary of tensors and lists of strings"
        ) from error


def _to_array(value: Any) -> NDArray[Any] | None:
    """Convert a tensor or list to an array; None for anything else."""
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return np.array(value) if isinstance(value, list | tuple) else None
    except (ValueError, TypeError, RuntimeError):  # such as sparse tensors, or lists of different lengths
        return None


def describe_array(key: str, array: Any) -> str:
    """Describe an array by name, type and shape, for messages."""
    return f"{key} {array.dtype} {array.shape}"


def _embeddings(arrays: dict[str, NDArray[Any]], contents: list[str], name: str) -> NDArray[np.float32]:
    for key in EMBEDDING_NAMES:
        for values in (array for stored_key, array in arrays.items() if stored_key.lower() == key):
            if values.ndim == 3 and len(values) == 1:
                values = values[0]
            if values.ndim == 2 and values.size and values.dtype.kind in "fiu":
                return values.astype(np.float32)
    raise ValueError(
        f"embedding: {name} has no numbers (n_spots, width) named {' or '.join(map(repr, EMBEDDING_NAMES))}; "
        f"it has {', '.join(contents) or 'nothing'}"
    )
