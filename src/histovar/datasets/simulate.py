"""Simulate sections with counts, embeddings, coordinates and images, for examples and tests."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse
from scipy.ndimage import gaussian_filter, map_coordinates

from histovar._arguments import Count, Positive, Seed, check_arguments
from histovar._memory import check_fits

# Distance between neighbouring spots, and diameter of a spot, in pixels at full resolution.
PITCH = 100.0
DIAMETER = 55.0
IMAGE_WIDTH = 800
# Embeddings are a mixture of a few features that saturate, like those of a network, so that the programs cannot be read
# off them by a linear map; and noise.
N_FEATURES = 12
SHARPNESS = 7.5
NOISE = 0.7
# Larger counts are not exact in 32-bit floats.
MOST_DEPTH = 1e6

Several = Annotated[Count, Field(ge=2)]


@check_arguments
def simulate(
    n_sections: Count = 4,
    n_spots: Several = 400,
    n_genes: Several = 200,
    *,
    n_programs: Several = 6,
    embedding_dim: Count = 1024,
    depth: Annotated[Positive, Field(le=MOST_DEPTH)] = 3000.0,
    random_state: Seed = 0,
) -> AnnData:
    """Simulate tissue sections with regions, gene programs, counts, embeddings and an H&E-like image.

    Smooth random fields, sharpened to regions, give every spot a mixture of gene programs. Counts are Poisson with
    gamma-distributed depth; embeddings are a fixed random non-linear function of the mixture, with noise.

    Parameters
    ----------
    n_sections, n_spots, n_genes
        Number of sections, of spots in each, and of genes.
    n_programs
        Number of gene programs.
    embedding_dim
        Width of the embeddings.
    depth
        Mean total count of a spot.
    random_state
        Seed; the same seed gives the same object.

    Returns
    -------
    AnnData
        Counts in ``X`` (CSR float32), ``obs["section"]``, ``obs["region"]``, ``obsm["X_histology"]`` (n_obs,
        embedding_dim) float32, ``obsm["spatial"]`` in pixels at full resolution, ``obsm["programs"]`` (the true
        mixture) and ``uns["spatial"][section]`` with an image.

    Raises
    ------
    ValueError
        If a number is too small, or so large that the object would not fit into memory.
    """
    n_values = n_sections * n_spots * (n_genes + embedding_dim + n_programs) + n_programs * n_genes
    sizes = {"n_sections": n_sections, "n_spots": n_spots, "n_genes": n_genes}
    sizes |= {"n_programs": n_programs, "embedding_dim": embedding_dim}
    check_fits(8 * n_values, ", ".join(f"{name}={n}" for name, n in sizes.items()), "ask for less")
    rng = np.random.default_rng(random_state)
    loadings = rng.gamma(0.25, 1.0, (n_programs, n_genes)) + 0.02
    loadings *= rng.lognormal(0, 1, n_genes)
    loadings /= loadings.sum(1, keepdims=True)
    program_density = rng.uniform(0.3, 1.0, n_programs)
    hidden_weights = rng.normal(0, SHARPNESS, (n_programs, N_FEATURES))
    offset = rng.normal(0, 1.5, N_FEATURES)
    output_weights = rng.normal(size=(N_FEATURES, embedding_dim)) / np.sqrt(N_FEATURES)

    columns: dict[str, list[Any]] = {"counts": [], "spatial": [], "mixture": [], "embedding": [], "section": []}
    images: dict[str, Any] = {}
    for number in range(1, n_sections + 1):
        coordinates, side = _grid(n_spots, rng)
        fields = [gaussian_filter(rng.normal(size=(64, 64)), 6, mode="nearest") for _ in range(n_programs)]
        grid_positions = coordinates.T[::-1] / side * 63
        activity = np.stack([map_coordinates(f / f.std(), grid_positions, order=1) for f in fields], axis=1)
        mixture = np.exp(2 * activity)
        mixture /= mixture.sum(1, keepdims=True)
        density = mixture @ program_density
        total = depth * density / density.mean() * rng.gamma(4, 1 / 4, n_spots)
        counts = rng.poisson(total[:, None] * (mixture @ loadings))
        clean = np.tanh((mixture - 1 / n_programs) @ hidden_weights + offset) @ output_weights
        columns["embedding"].append(clean + rng.normal(0, NOISE, clean.shape))
        columns["counts"].append(counts)
        columns["spatial"].append(coordinates)
        columns["mixture"].append(mixture)
        name = f"S{number}"
        columns["section"] += [name] * n_spots
        image = _picture(coordinates, mixture, density, side, rng)
        scale = {"tissue_hires_scalef": IMAGE_WIDTH / side, "spot_diameter_fullres": DIAMETER}
        images[name] = {"images": {"hires": image}, "scalefactors": scale}

    mixture = np.concatenate(columns["mixture"])
    obs = pd.DataFrame(
        {
            "section": pd.Categorical(columns["section"]),
            "region": pd.Categorical([f"region {i + 1}" for i in mixture.argmax(1)]),
        },
        index=[f"{s}_{i}" for s in dict.fromkeys(columns["section"]) for i in range(n_spots)],
    )
    var = pd.DataFrame(index=[f"GENE{i + 1}" for i in range(n_genes)])
    adata = AnnData(sparse.csr_matrix(np.concatenate(columns["counts"]), dtype=np.float32), obs=obs, var=var)
    adata.obsm["X_histology"] = np.concatenate(columns["embedding"]).astype(np.float32)
    adata.obsm["spatial"] = np.concatenate(columns["spatial"])
    adata.obsm["programs"] = mixture.astype(np.float32)
    adata.uns["spatial"] = images
    return adata


def _grid(n_spots: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], float]:
    """Make a hexagonal grid of spots within a rounded piece of tissue; also return the side of its square image."""
    reach = int(np.ceil(np.sqrt(n_spots))) + 4
    columns, rows = np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1))
    grid = np.column_stack([(columns + 0.5 * (rows % 2)).ravel(), (rows * np.sqrt(3) / 2).ravel()])
    angle = np.arctan2(grid[:, 1], grid[:, 0])
    phase = rng.uniform(0, 2 * np.pi, 3)
    outline = 1 + sum(0.08 * np.sin((k + 2) * angle + phase[k]) for k in range(3))
    nearest = np.argsort(np.hypot(*grid.T) / outline, kind="stable")[:n_spots]
    chosen = grid[np.sort(nearest)]
    extent = np.abs(chosen).max() + 2
    return (chosen + extent) * PITCH, 2 * extent * PITCH


def _picture(
    coordinates: NDArray[np.float64],
    mixture: NDArray[np.float64],
    density: NDArray[np.float64],
    side: float,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Draw an H&E-like image: pink stroma that varies with the programs, purple nuclei by cell density."""
    width = IMAGE_WIDTH
    pixel = (coordinates / side * width).astype(int)
    pitch = PITCH / side * width

    def spread(values: NDArray[np.float64]) -> NDArray[np.float64]:
        canvas = np.zeros((width, width))
        canvas[pixel[:, 1], pixel[:, 0]] = values
        return gaussian_filter(canvas, pitch * 0.6)

    cover = spread(np.ones(len(coordinates)))
    weight = np.maximum(cover, 1e-9)
    tissue = np.clip(cover / np.quantile(cover[pixel[:, 1], pixel[:, 0]], 0.2) * 1.4 - 0.4, 0, 1)
    tint = spread(mixture @ np.linspace(-1, 1, mixture.shape[1])) / weight
    cells = spread(density) / weight
    grain = gaussian_filter(rng.normal(size=(width, width)), 1.5)
    grain /= grain.std()
    seeds = rng.random((width, width)) < 0.05 * np.clip(cells, 0, 1) ** 2
    nuclei = np.clip(gaussian_filter(seeds.astype(float), 1.2) * 12, 0, 1)
    slide, stroma, nucleus = np.array([[244, 241, 245], [228, 160, 196], [92, 58, 138]], dtype=float)
    colour = stroma + tint[..., None] * np.array([14, -26, -10]) + grain[..., None] * np.array([4, 7, 4])
    colour = colour * (1 - nuclei[..., None]) + nucleus * nuclei[..., None]
    picture = slide * (1 - tissue[..., None]) + colour * tissue[..., None]
    return picture.clip(0, 255).astype(np.uint8)
