"""What stage 2 knows of a spot: its histology, its niche, optionally its place and covariates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .precision import full_precision

# A section's mean and standard deviation are shrunk towards those of training as if so many more spots had been seen.
SHRINKAGE = 8
# Sections of one tissue lie closer to each other than this (mean squared shift of the mean embedding, in units of the
# variance within sections): 0.01 to 0.06 on her2st and on mouse olfactory bulb.
FAMILIAR = 0.1


class Histology(NamedTuple):
    """The inputs of a batch of spots.

    Parameters
    ----------
    sources
        One (n_spots, dim) tensor for each of ``config.source_dims``: each embedding, followed by its mean
        over each neighbourhood; the outline; once aligned (:meth:`ConditionProcessor.align`), their principal
        components, for each of ``config.statistics`` one after another.
    coordinates
        (n_spots, 2) in [0, 1] within the section, or (n_spots, 0).
    covariates
        (n_spots, n_covariates), or (n_spots, 0).
    novelty
        (n_spots,) how unlike the training sections the spot's section is: 0 (as alike as they are to each other) to 1.
        :meth:`ConditionProcessor.align` sets it; it starts at 0.
    """

    sources: tuple[Tensor, ...]
    coordinates: Tensor
    covariates: Tensor
    novelty: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Histology:
        """Apply a function to every tensor, for instance to pick rows or to change device."""
        return Histology(
            tuple(function(source) for source in self.sources),
            function(self.coordinates),
            function(self.covariates),
            function(self.novelty),
        )


def sine_cosine(positions: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """Fixed sine-cosine encoding (Vaswani et al. 2017): (...,) to (..., width)."""
    half = width // 2
    rates = torch.exp(-torch.log(torch.tensor(period)) * torch.arange(half, device=positions.device) / half)
    angles = positions[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


class Moments(NamedTuple):
    """Number of spots of a section, and mean and variance of each of their sources, (dim,) each."""

    n: int
    means: tuple[Tensor, ...]
    variances: tuple[Tensor, ...]

    @classmethod
    def of(cls, sources: Sequence[Tensor]) -> Moments:
        """Those of some spots."""
        return cls(len(sources[0]), tuple(s.mean(0) for s in sources), tuple(s.var(0, correction=0) for s in sources))

    @classmethod
    def by_section(cls, histology: Histology, sections: Tensor) -> dict[int, Moments]:
        """Those of each section, by its number."""
        labels = sections.unique()
        return {int(label): cls.of([source[sections == label] for source in histology.sources]) for label in labels}

    def to(self, device: torch.device) -> Moments:
        """The same on a device."""
        means, variances = (tuple(t.to(device) for t in values) for values in (self.means, self.variances))
        return Moments(self.n, means, variances)

    @classmethod
    def combined(cls, parts: Sequence[Moments]) -> Moments:
        """Those of all spots of several parts (Chan, Golub & LeVeque 1979)."""
        n = sum(part.n for part in parts)
        shares = torch.tensor([part.n / n for part in parts], dtype=torch.double)[:, None]
        means, variances = [], []
        for i in range(len(parts[0].means)):
            each = torch.stack([part.means[i] for part in parts]).double()
            mean = (shares * each).sum(0)
            within = (shares * torch.stack([part.variances[i] for part in parts]).double()).sum(0)
            means.append(mean.float())
            variances.append((within + (shares * (each - mean).square()).sum(0)).float())
        return cls(n, tuple(means), tuple(variances))


class ConditionProcessor(nn.Module):
    """Turns the inputs of a spot into a short memory to which every layer of the transformer attends.

    One memory vector for each source (and one for coordinates and covariates, where used). With
    ``condition="pca"`` sources are standardised, by each of ``config.statistics``, and projected onto principal
    components of the training spots, which are fixed; the memory is made of the first. Standardising a section by its
    own mean and standard deviation takes stain and scanner out, and with them what sets the section's tissue apart;
    which matters more differs between data sets, and cannot be told from few sections. With ``"mlp"`` the reference's
    network turns embedding and coordinates into a memory of one.

    Parameters
    ----------
    config
        The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        if config.condition == "mlp":
            dim, hidden = config.embedding_dims[0], config.condition_hidden
            self.histology = nn.Sequential(
                nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
            )
            if config.coordinates:
                self.place = nn.Sequential(
                    nn.Linear(2, config.coordinate_hidden),
                    nn.ReLU(),
                    nn.Linear(config.coordinate_hidden, config.coordinate_dim),
                    nn.LayerNorm(config.coordinate_dim),
                )
            return
        for i, (dim, projected) in enumerate(zip(config.source_dims, config.projected_dims, strict=True)):
            self.register_buffer(f"centre_{i}", torch.zeros(dim))
            self.register_buffer(f"spread_{i}", torch.ones(dim))
            self.register_buffer(f"projection_{i}", torch.zeros(len(config.statistics), dim, projected))
        self.register_buffer("familiar", torch.tensor(FAMILIAR))
        self.inputs = nn.ModuleList(nn.Linear(width, config.width) for width in [*config.projected_dims, *self._more])
        self.norm = nn.LayerNorm(config.width)

    familiar: Tensor

    @property
    def _more(self) -> list[int]:
        """Widths of coordinates and covariates, where used."""
        return [n for n in (2 * self.config.coordinates, self.config.n_covariates) if n]

    @property
    def feature_widths(self) -> list[int]:
        """Width of each part of :meth:`features`."""
        return [*self.config.aligned_dims, *self._more]

    @cached_property
    def views(self) -> list[list[range]]:
        """Columns of :meth:`features` that members of the prior take, equally many each, in the order to take them.

        With ``standardize="auto"`` and three neighbourhoods or more a view has the smallest and one of the others. Each
        of these is seen by the first of ``config.statistics``, the widest by the second, too. Else views have all.
        """
        config = self.config
        columns = [range(a, b) for a, b in pairwise([0, *accumulate(self.feature_widths)])]
        n_sources, step = len(config.projected_dims), 1 + len(config.n_neighbors)
        wide = range(2, step) if step > 3 and config.standardize == "auto" else [0]

        def view(statistics: int, neighborhood: int) -> list[range]:
            first = statistics * n_sources
            left_out = {*wide} - {neighborhood} if neighborhood else set()
            n_niche = len(config.embedding_dims) * step
            own = [i for i in range(n_sources) if i >= n_niche or i % step not in left_out]
            return [columns[first + i] for i in own] + columns[n_sources * len(config.statistics) :]

        found = [view(0, neighborhood) for neighborhood in wide]
        by_training = [view(1, wide[-1])] if len(config.statistics) > 1 else []
        return [*found[:1], *by_training, *found[1:]]

    @torch.no_grad()
    def fit(self, histology: Histology, sections: Tensor, moments: Mapping[int, Moments] | None = None) -> None:
        """Take means, standard deviations within sections and principal components from the training spots.

        Standardised sources are projected onto their leading principal components and divided by the projection's root
        mean square, so that the components keep their relative sizes.

        Parameters
        ----------
        histology
            Inputs of the training spots, or of a sample of them.
        sections
            (n_spots,) number of each spot's section.
        moments
            Those of each section, where the spots are but a sample.
        """
        if self.config.condition == "mlp":
            return
        moments = moments or Moments.by_section(histology, sections)
        shares = torch.tensor([float(own.n) for own in moments.values()])
        shares = (shares / shares.sum())[:, None]
        for i in range(len(histology.sources)):
            means, variances = (
                torch.stack(values)
                for values in zip(*((m.means[i], m.variances[i]) for m in moments.values()), strict=True)
            )
            spread = variances.mean(0).sqrt()
            getattr(self, f"centre_{i}").copy_((shares * means).sum(0))
            getattr(self, f"spread_{i}").copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))
        shifts = torch.stack([self._shift(own.means[0]) for own in moments.values()])
        # About twice as far as another section is to be expected, of few: their mean lies near each of them.
        self.familiar.copy_((4 * shifts.mean()).clamp(min=FAMILIAR))
        for k, statistics in enumerate(self.config.statistics):
            for i, source in enumerate(self._standardized(histology, sections, moments, statistics)):
                projection = getattr(self, f"projection_{i}")[k]
                projection.zero_()
                axes = torch.linalg.svd(source, full_matrices=False).Vh[: projection.shape[1]].T
                scale = (source @ axes).square().mean().sqrt().clamp(min=1e-8)
                projection[:, : axes.shape[1]] = axes / scale

    def _shift(self, mean: Tensor) -> Tensor:
        """Mean squared shift of a section's mean embedding from that of training."""
        return ((mean - self.get_buffer("centre_0")) / self.get_buffer("spread_0")).square().mean()

    @torch.no_grad()
    def align(self, histology: Histology, sections: Tensor, moments: Mapping[int, Moments] | None = None) -> Histology:
        """Standardise every source and project it onto its components; set the novelty of every section.

        By its own statistics a section of n spots is standardised by ``(n * own + 8 * training) / (n + 8)`` of means
        and of variances, so that a section of few spots falls back on what training had.

        Parameters
        ----------
        histology
            Inputs as they were read.
        sections
            (n_spots,) number of each spot's section.
        moments
            Those of each section, where the spots are but some of it.

        Returns
        -------
        Histology
            With sources of ``config.aligned_dims``, as :meth:`features` and ``forward`` take them; unchanged
            where ``condition="mlp"``.
        """
        if self.config.condition == "mlp":
            return histology
        moments = moments or Moments.by_section(histology, sections)
        with full_precision(sections.device):
            projected = [
                source @ getattr(self, f"projection_{i}")[k]
                for k, statistics in enumerate(self.config.statistics)
                for i, source in enumerate(self._standardized(histology, sections, moments, statistics))
            ]
        return histology._replace(sources=tuple(projected), novelty=self._novelty(histology, sections, moments))

    def _standardized(
        self, histology: Histology, sections: Tensor, moments: Mapping[int, Moments], statistics: str
    ) -> list[Tensor]:
        """Sources standardised section by section."""
        aligned = [torch.empty_like(source) for source in histology.sources]
        for section in sections.unique():
            rows = torch.nonzero(sections == section)[:, 0]
            own = moments[int(section)]
            weight = SHRINKAGE / (own.n + SHRINKAGE) if statistics == "section" else 1.0
            for i, source in enumerate(histology.sources):
                centre, spread = getattr(self, f"centre_{i}"), getattr(self, f"spread_{i}")
                mean = torch.lerp(own.means[i], centre, weight)
                variance = torch.lerp(own.variances[i], spread.square(), weight)
                aligned[i][rows] = (source[rows] - mean) / variance.sqrt()
        return aligned

    def _novelty(self, histology: Histology, sections: Tensor, moments: Mapping[int, Moments]) -> Tensor:
        """Novelty of each spot's section."""
        novelty = torch.zeros_like(histology.novelty)
        for section in sections.unique():
            own = moments[int(section)]
            shift = self._shift(own.means[0]) * own.n / (own.n + SHRINKAGE)
            novelty[sections == section] = (1 - self.familiar / shift.clamp(min=1e-12)).clamp(min=0)
        return novelty

    def _parts(self, histology: Histology) -> list[Tensor]:
        parts = list(histology.sources)
        if self.config.coordinates:
            parts.append(histology.coordinates)
        if self.config.n_covariates:
            parts.append(histology.covariates)
        return parts

    @property
    def n_features(self) -> int:
        """Width of :meth:`features`."""
        return sum(self.feature_widths)

    def features(self, histology: Histology) -> Tensor:
        """Projected sources, coordinates and covariates of aligned spots side by side: (n_spots, n_features)."""
        return torch.cat(self._parts(histology), 1)

    def forward(self, histology: Histology) -> Tensor:
        """The memory of every spot.

        Parameters
        ----------
        histology
            Inputs of the batch, aligned (:meth:`align`).

        Returns
        -------
        Tensor
            (n_spots, n_memory, width).
        """
        if self.config.condition == "mlp":
            parts = [self.histology(histology.sources[0])]
            if self.config.coordinates:
                place = histology.coordinates
                half = self.config.coordinate_dim // 2
                waves = torch.cat([sine_cosine(place[:, 0], half), sine_cosine(place[:, 1], half)], 1)
                parts.append(self.place(place) + waves)
            return torch.cat(parts, 1)[:, None]
        parts = self._parts(histology)
        n_sources = len(self.config.projected_dims)
        parts = parts[:n_sources] + parts[len(histology.sources) :]
        memory = torch.stack([layer(part) for layer, part in zip(self.inputs, parts, strict=True)], 1)
        normed: Tensor = self.norm(memory)
        return normed
