"""Write slots of AnnData and record them in ``uns``; other data are never overwritten, failed calls are undone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning

from histovar._keys import Keys
from histovar._version import __version__

# Store and name of a slot, such as ("obsm", "histovar_tokens").
Slot = tuple[str, str]

RECORDED = "slots"
# Where slots are.
STORES = ("obs", "var", "layers", "obsm", "varm", "uns")


def record(adata: AnnData, keys: Keys) -> Mapping[str, Any]:
    """Get the entry of ``uns`` for the slots of a prefix; empty if histovar wrote none.

    Raises
    ------
    ValueError
        If that entry was not written by histovar.
    """
    stored = adata.uns.get(keys.uns, {})
    if not isinstance(stored, Mapping) or (len(stored) and not _is_ours(stored)):
        raise ValueError(
            f"key_added: uns[{keys.uns!r}] was not written by histovar; choose another key_added, or rename that entry"
        )
    return stored


def _is_ours(stored: Mapping[str, Any]) -> bool:
    """True if histovar wrote an entry of ``uns``; concatenating objects of two versions drops its version."""
    return "version" in stored or RECORDED in stored


def check_free(adata: AnnData, keys: Keys, slots: Iterable[Slot]) -> None:
    """Refuse to overwrite slots that histovar did not write.

    Parameters
    ----------
    adata
        The object.
    keys
        Prefix of the slots.
    slots
        Slots that will be written.

    Raises
    ------
    ValueError
        If a slot holds other data; the message names it.
    """
    ours = _recorded(record(adata, keys))
    others = {slot for name, stored in adata.uns.items() if name != keys.uns for slot in _recorded(stored) or ()}
    for store, name in slots:
        if name not in getattr(adata, store):
            continue
        # Files of earlier versions record only the prefix: `ours` is then None.
        if (store, name) in others or not (ours is None or (store, name) in ours):
            raise ValueError(
                f"key_added: {store}[{name!r}] was not written by histovar as {keys.prefix!r}; choose another "
                f"key_added, or delete it first (del adata.{store}[{name!r}])"
            )


def _recorded(stored: Any) -> set[Slot] | None:
    """Slots recorded in an entry of ``uns``; None if an earlier version did not record them."""
    if not isinstance(stored, Mapping) or not _is_ours(stored):
        return set()
    if RECORDED not in stored:
        return None
    return {tuple(str(slot).split("/", 1)) for slot in np.asarray(stored[RECORDED]).ravel()}  # type: ignore[misc]


def _by_name(adata: AnnData, keys: Keys) -> set[Slot]:
    """Slots whose names begin with the prefix, for files of earlier versions, which did not record slots."""
    return {
        (store, name)
        for store in ("layers", "obsm", "varm", "var")
        for name in getattr(adata, store)
        if name is not None and (name == keys.prefix or name.startswith(f"{keys.prefix}_"))
    }


def write(adata: AnnData, keys: Keys, slots: Mapping[Slot, Any], entries: Mapping[str, Any] | None = None) -> None:
    """Write slots, and record them in ``uns`` together with entries of plain types.

    Raises
    ------
    ValueError
        If a slot holds data that histovar did not write.
    """
    check_free(adata, keys, slots)
    stored = dict(record(adata, keys))
    recorded = _recorded(stored)
    claimed = (_by_name(adata, keys) if recorded is None else recorded) | set(slots)
    with writing(adata), _quiet_on_views():
        for (store, name), values in slots.items():
            getattr(adata, store)[name] = values
        adata.uns[keys.uns] = {
            **stored,
            **(entries or {}),
            RECORDED: np.array(sorted(f"{store}/{name}" for store, name in claimed), dtype=str),
            "version": __version__,
        }


def drop(adata: AnnData, keys: Keys, slots: Iterable[Slot] = (), entries: Iterable[str] = ()) -> None:
    """Delete slots that histovar wrote, and entries of ``uns``, that are out of date."""
    stored = dict(record(adata, keys))
    ours = _recorded(stored)
    present = [(store, name) for store, name in slots if name in getattr(adata, store)]
    dropped = present if ours is None else [slot for slot in present if slot in ours]
    with writing(adata), _quiet_on_views():
        for store, name in dropped:
            del getattr(adata, store)[name]
        for entry in entries:
            stored.pop(entry, None)
        if ours:
            kept = sorted(f"{store}/{name}" for store, name in ours - set(dropped))
            stored[RECORDED] = np.array(kept, dtype=str)
        if stored:
            adata.uns[keys.uns] = stored


@contextmanager
def writing(adata: AnnData) -> Iterator[None]:
    """Write to an object, and put everything back as it was if that fails or is interrupted.

    Slots are replaced and never changed in place, so that it is enough to keep references to what they held. A view
    becomes an actual object when it is written to, as users expect of in-place functions.
    """
    was_view = adata.is_view
    # A view of the same spots and genes keeps what its parent holds of them.
    before = adata[:] if was_view else {store: _shallow_copy(getattr(adata, store)) for store in STORES}
    try:
        yield
    except BaseException:
        if not adata.is_view:
            for store in STORES:
                _restore(adata, store, _shallow_copy(getattr(before, store)) if was_view else before[store])
        raise


@contextmanager
def _quiet_on_views() -> Iterator[None]:
    """Switch off anndata's warning that a view becomes an actual object."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        yield


def _shallow_copy(store: Any) -> Any:
    """Shallow copy of a store's entries, which stays the same when entries of the store are replaced."""
    if isinstance(store, pd.DataFrame):
        return store.copy(deep=False)
    return {name: values for name, values in store.items() if name is not None}  # None is X, in anndata 0.13


def _restore(adata: AnnData, store: str, before: Any) -> None:
    """Restore the entries that a store had before."""
    now = getattr(adata, store)
    if isinstance(now, pd.DataFrame):
        if not now.equals(before):
            setattr(adata, store, before)
        return
    for name in now.keys() - before.keys() - {None}:
        del now[name]
    for name, values in before.items():
        if name not in now or now[name] is not values:
            now[name] = values
