"""Download models from the Hugging Face Hub, and upload them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from histovar._extras import import_extra

from .readme import FILE as README

# hf://owner/name, or hf://owner/name@revision; pathlib turns the two slashes into one.
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
ADDRESS = re.compile(rf"hf:/+(?P<repository>{REPOSITORY.pattern})(?:@(?P<revision>[\w./-]+))?")
FILES = ("model.json", "*.safetensors", README)


def local_directory(path: Path) -> Path:
    """Local directory of a model; one on the hub is downloaded to the hub's cache first, unless it is there already.

    Parameters
    ----------
    path
        A directory, ``hf://owner/name`` or ``hf://owner/name@revision``.

    Raises
    ------
    ImportError
        If huggingface-hub is needed but not installed.
    ValueError
        If the address has another form.
    FileNotFoundError
        If the hub has no such model, or cannot be reached and the model is not in the cache.
    """
    if path.parts[:1] != ("hf:",):
        return path
    address = ADDRESS.fullmatch(path.as_posix())
    if address is None:
        raise ValueError(f"path: expected hf://owner/name or hf://owner/name@revision, got {path.as_posix()!r}")
    hub = import_extra("huggingface_hub", "hub", "loading from hf://")
    try:
        directory = hub.snapshot_download(
            address["repository"], revision=address["revision"], allow_patterns=list(FILES)
        )
    except Exception as error:  # noqa: BLE001 (also errors of the HTTP library, which differs between versions)
        raise FileNotFoundError(
            f"path: {address['repository']!r} could not be downloaded from the Hugging Face Hub, and is not in its "
            f"cache ({_short(error)}); check the name, the network and, if it is private or gated, hf auth login"
        ) from None
    return Path(directory)


def push_model(save: Callable[[Path], None], repository: str, *, private: bool) -> str:
    """Upload a model to the hub, written by `save` to a temporary directory; see :meth:`TwoStageVARST.push`."""
    if REPOSITORY.fullmatch(repository) is None:
        raise ValueError(f"repository: expected 'owner/name', got {repository!r}")
    hub = import_extra("huggingface_hub", "hub", "push")
    api = hub.HfApi()
    with tempfile.TemporaryDirectory() as folder:
        try:
            (Path(folder) / README).write_bytes(Path(hub.hf_hub_download(repository, README)).read_bytes())
        except hub.errors.LocalEntryNotFoundError as error:  # the hub was not reached
            _refuse(repository, error)
        except (hub.errors.EntryNotFoundError, hub.errors.RepositoryNotFoundError):
            pass
        except Exception as error:  # noqa: BLE001 (as above)
            _refuse(repository, error)
        save(Path(folder))
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model of histovar")
        except Exception as error:  # noqa: BLE001 (as above)
            _refuse(repository, error)
    return str(commit.oid)


def _refuse(repository: str, error: Exception) -> NoReturn:
    """Raise an error that says why the repository could not be written."""
    raise ConnectionError(
        f"repository: {repository!r} could not be written to the Hugging Face Hub ({_short(error)}); check the name, "
        "the network and hf auth login"
    ) from None


def _short(error: Exception) -> str:
    """Format an error as its type and the first line of its message."""
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {' '.join(lines[0].split())[:160]}"
