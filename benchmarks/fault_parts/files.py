"""Damaged files and files of other content, read by ``predict`` and by the readers of data sets."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy import sparse

import histovar as hv
from histovar.anndata_io import files as readers

from .cases import compare, damage, outcome

if TYPE_CHECKING:
    from faults import Setting


def files(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Flip one bit of files of each kind, or cut their end off; read files of embeddings with other content."""
    query = setting.query.copy()
    query.uns.clear()
    query.write_h5ad(setting.scratch / "in.h5ad")
    query.write_h5ad(setting.scratch / "packed.h5ad", compression="gzip")
    query.write_zarr(setting.scratch / "damaged.zarr")
    n = max(2, round(60 * share))

    def predict(path: Path) -> str:
        adata = readers.read_files([path])
        hv.tl.predict(adata, setting.models[0], **setting.keys)
        return compare(np.asarray(adata.obsm["histovar"]), setting.expected)

    def stream(path: Path) -> str:
        adata = readers.read_store(path, genes=["none"])
        hv.tl.predict(adata, setting.models[0], **setting.keys)
        return compare(np.asarray(adata.obsm["histovar"]), setting.expected)

    store = setting.scratch / "damaged.zarr"
    for i in range(n):
        kind = ("flip", "cut")[i % 2]
        for name in ("in.h5ad", "packed.h5ad"):
            path = setting.scratch / name
            yield f"files, {name}, {kind}", _outcome_if_damaged(setting, path, kind, lambda path=path: predict(path))
        file = setting.rng.choice(np.array([f for f in sorted(store.rglob("*")) if f.is_file()], object))
        yield f"files, zarr, {kind}", _outcome_if_damaged(setting, file, kind, lambda: predict(store))
        yield f"files, zarr streamed, {kind}", _outcome_if_damaged(setting, file, kind, lambda: stream(store))
    yield from _hest(setting, n)
    yield from _her2st(setting, n)


def _outcome_if_damaged(setting: Setting, file: Path, kind: str, case: Callable[[], str]) -> str:
    content = file.read_bytes()
    file.write_bytes(damage(content, setting.rng, kind))
    try:
        return outcome(case)
    finally:
        file.write_bytes(content)


def _hest(setting: Setting, n: int) -> Iterator[tuple[str, str]]:
    root = setting.scratch / "hest"
    (root / "st").mkdir(parents=True)
    query = setting.query
    slide = ad.AnnData(query.X, obs=query.obs[[]], var=query.var[[]], obsm={"spatial": query.obsm["spatial"]})
    slide.write_h5ad(root / "st" / "S4.h5ad")
    values = query.obsm["X_histology"].astype(np.float32)

    def read() -> str:
        adata = hv.datasets.hest(root, embedding="uni")
        return compare(adata.obsm["X_uni"], values)

    file = root / "S4_uni.pt"
    names = list(slide.obs_names)
    for i in range(n):
        kind = ("flip", "cut")[i % 2]
        torch.save({"embeddings": torch.from_numpy(values), "barcodes": names}, file)
        yield f"files, hest's .pt, {kind}", _outcome_if_damaged(setting, file, kind, read)
        yield f"files, hest's .h5ad, {kind}", _outcome_if_damaged(setting, root / "st" / "S4.h5ad", kind, read)
        file.unlink()
        with h5py.File(file.with_suffix(".h5"), "w") as store:
            store["embeddings"], store["barcodes"] = values, names
        yield f"files, hest's .h5, {kind}", _outcome_if_damaged(setting, file.with_suffix(".h5"), kind, read)
        file.with_suffix(".h5").unlink()
    for content in _other_content(values):
        file.write_bytes(content)
        yield "files, .pt of another type", outcome(read)
    file.unlink()
    for content in _other_content(values):
        file.with_suffix(".h5").write_bytes(content)
        yield "files, .h5 of another type", outcome(read)
    shutil.rmtree(root)


def _other_content(values: np.ndarray) -> Iterator[bytes]:
    """Contents of files that are not embeddings of a slide, though some hold its numbers."""
    tensor = torch.from_numpy(values)
    objects = (
        *(
            torch.nn.Linear(2, 2),
            torch.nn.Linear(2, 2).state_dict(),
            values,
            tensor.to_sparse(),
            tensor.to(torch.cfloat),
        ),
        *(
            tensor[None, None],
            tensor[0],
            tensor[:0],
            tensor[:, :0],
            tensor > 0,
            "text",
            None,
            3,
            [],
            {},
            [tensor],
            {1: tensor},
        ),
        *(
            {"embeddings": "text"},
            {"embeddings": [[1, 2], [3]]},
            {"embeddings": tensor, "barcodes": [1.5] * len(values)},
        ),
        *(
            {"embeddings": {"a": tensor}},
            {"embeddings": tensor, "barcodes": tensor},
            torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        ),
    )
    for thing in objects:
        stream = io.BytesIO()
        torch.save(thing, stream)
        yield stream.getvalue()
    table, archive = io.BytesIO(), io.BytesIO()
    pd.DataFrame(values).to_csv(table)
    np.savez(archive, embeddings=values)
    yield from (table.getvalue(), archive.getvalue(), b"", b"\0" * 1000, b"\x89HDF\r\n\x1a\n", b"PK\x03\x04")


def _her2st(setting: Setting, n: int) -> Iterator[tuple[str, str]]:
    root = setting.scratch / "her2st"
    for folder in ("ST-cnts", "ST-spotfiles", "ST-imgs/B/B1"):
        (root / folder).mkdir(parents=True)
    places = [(x, y) for x in range(5) for y in range(5)]
    counts = setting.rng.poisson(3.0, (25, 20))
    names = [f"{x}x{y}" for x, y in places]
    genes = [f"G{i}" for i in range(20)]
    pd.DataFrame(counts, names, genes).to_csv(root / "ST-cnts" / "B1.tsv.gz", sep="\t")
    spots = pd.DataFrame(places, columns=["x", "y"]).assign(
        pixel_x=lambda t: 10 * t.x + 5.0, pixel_y=lambda t: 10 * t.y
    )
    spots.to_csv(root / "ST-spotfiles" / "B1_selection.tsv", sep="\t", index=False)
    image = root / "ST-imgs" / "B" / "B1" / "B1.jpg"
    Image.fromarray(setting.rng.integers(0, 255, (60, 60, 3), np.uint8)).save(image, progressive=True)

    def read() -> str:
        adata = hv.datasets.her2st(root, image_width=30)
        return compare(sparse.csr_matrix(adata.X).toarray(), counts)

    for i in range(n):
        kind = ("flip", "cut")[i % 2]
        for file in (root / "ST-cnts" / "B1.tsv.gz", root / "ST-spotfiles" / "B1_selection.tsv", image):
            yield f"files, her2st, {kind}", _outcome_if_damaged(setting, file, kind, read)
    # A JPEG whose header states a size beyond that of any slide.
    content = image.read_bytes()
    start = content.index(b"\xff\xc2") + 5
    image.write_bytes(content[:start] + b"\xff\xff\xff\xff" + content[start + 4 :])
    said = outcome(read)
    yield "files, her2st, an image of 4 billion pixels", said if said == "refused" else f"not refused: {said}"
