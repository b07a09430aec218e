"""Models on the Hugging Face Hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from histovar._extras import import_extra

from .readme import FILE as README

# hf://owner/name, or hf://owner/name@revision; a path has made one slash of the two.
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
ADDRESS = re.compile(rf"hf:/+(?P<repository>{REPOSITORY.pattern})(?:@(?P<revision>[\w./-]+))?")
FILES = ("model.json", "*.safetensors", README)


def local_directory(path: Path) -> Path:
    """Where a model is on this machine: a directory as it is, one of the hub in its cache, downloaded if need be.

    Parameters
    ----------
    path
        A directory, ``hf://owner/name`` or ``hf://owner/name@revision``.

    Raises
    ------
    ImportError
        If huggingface-hub is needed and not installed.
    ValueError
        If the address is not of that form.
    FileNotFoundError
        If there is no such model on the hub, or it is neither in the cache nor within reach.
    """
    if path.parts[:1] != ("hf:",):
        return path
    address = ADDRESS.fullmatch(path.as_posix())
    if address is None:
        raise ValueError(f"path: expected hf://owner/name or hf://owner/name@revision, got {path.as_posix()!r}")
    hub = import_extra("huggingface_hub", "hub", "loading from hf://")
    try:
        found = hub.snapshot_download(address["repository"], revision=address["revision"], allow_patterns=list(FILES))
    except Exception as error:  # noqa: BLE001 (errors of the HTTP library, which is another in each version, among them)
        raise FileNotFoundError(
            f"path: {address['repository']!r} is not to be had from the Hugging Face Hub, nor in its cache "
            f"({_short(error)}); check the name, the network and, if it is private or gated, hf auth login"
        ) from None
    return Path(found)


def push_model(save: Callable[[Path], None], repository: str, *, private: bool) -> str:
    """Put on the hub what a function saves to a directory; see :meth:`TwoStageVARST.push`."""
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
            done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model of histovar")
        except Exception as error:  # noqa: BLE001 (as above)
            _refuse(repository, error)
    return str(done.oid)


def _refuse(repository: str, error: Exception) -> NoReturn:
    raise ConnectionError(
        f"repository: {repository!r} could not be written on the Hugging Face Hub ({_short(error)}); check the name, "
        "the network and hf auth login"
    ) from None


def _short(error: Exception) -> str:
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {' '.join(lines[0].split())[:160]}"
