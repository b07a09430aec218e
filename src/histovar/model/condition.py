"""Inputs of stage 2: a spot's histology and niche, optionally coordinates and covariates, and their standardisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .precision import full_precision

# Weight, in spots, of the training statistics towards which a section's mean and variance are shrunk.
SHRINKAGE = 8
# Largest shift of a section that counts as familiar: mean squared shift of its mean embedding, in units of the variance
# within sections. Sections of one tissue have 0.01 to 0.06 on her2st and on mouse olfactory bulb.
FAMILIAR = 0.1


class Histology(NamedTuple):
    """Histology inputs of a batch of spots: embeddings with their niche, coordinates, covariates.

    Parameters
    ----------
    sources
        One (n_spots, dim) tensor for each of ``config.source_dims``: each embedding followed by its mean
        over each neighbourhood, then the outline. After :meth:`ConditionProcessor.align`, their principal
        components, first all by the first of ``config.statistics``, then all by the second, if any.
    coordinates
        (n_spots, 2) in [0, 1] within the section, or (n_spots, 0).
    covariates
        (n_spots, n_covariates), or (n_spots, 0).
    novelty
        (n_spots,) how unlike the training sections the spot's section is, from 0 (no more than they differ among
        themselves) to 1; zero until :meth:`ConditionProcessor.align` sets it.
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
    """Sine-cosine encoding of positions (Vaswani et al. 2017): (...,) to (..., width)."""
    half = width // 2
    rates = torch.exp(-torch.log(torch.tensor(period)) * torch.arange(half, device=positions.device) / half)
    angles = positions[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


class Moments(NamedTuple):
    """Statistics of a section: its number of spots, and mean and variance of each source, (dim,) each."""

    n: int
    means: tuple[Tensor, ...]
    variances: tuple[Tensor, ...]

    @classmethod
    def of(cls, sources: Sequence[Tensor]) -> Moments:
        """Compute the moments of all given spots together."""
        return cls(len(sources[0]), tuple(s.mean(0) for s in sources), tuple(s.var(0, correction=0) for s in sources))

    @classmethod
    def by_section(cls, histology: Histology, sections: Tensor) -> dict[int, Moments]:
        """Compute the moments of each section, by its number."""
        labels = sections.unique()
        return {int(label): cls.of([source[sections == label] for source in histology.sources]) for label in labels}

    def to(self, device: torch.device) -> Moments:
        """Move the moments to a device."""
        means, variances = (tuple(t.to(device) for t in values) for values in (self.means, self.variances))
        return Moments(self.n, means, variances)

    @classmethod
    def combined(cls, parts: Sequence[Moments]) -> Moments:
        """Combine moments of several sets of spots to those of all (Chan, Golub & LeVeque 1979)."""
        n = sum(part.n for part in parts)
        shares = torch.tensor([part.n / n for part in parts], dtype=torch.double)[:, None]
        means, variances = [], []
        for i in range(len(parts[0].means)):
            part_means = torch.stack([part.means[i] for part in parts]).double()
            mean = (shares * part_means).sum(0)
            within = (shares * torch.stack([part.variances[i] for part in parts]).double()).sum(0)
            means.append(mean.float())
            variances.append((within + (shares * (part_means - mean).square()).sum(0)).float())
        return cls(n, tuple(means), tuple(variances))


class ConditionProcessor(nn.Module):
    """Turns the inputs of a spot into a short memory to which every layer of the transformer attends.

    The memory has one vector for each source (and one each for coordinates and covariates, where used). With
    ``condition="pca"`` sources are standardised, by each of ``config.statistics``, and projected onto fixed principal
    components of the training spots; the memory uses those standardised by the first of the statistics. Standardising a
    section by its own mean and standard deviation removes effects of stain and scanner, but also what distinguishes the
    section's tissue; which of the two matters more differs between data sets, and a few sections cannot show it. With
    ``"mlp"`` the reference's network turns embedding and coordinates into a memory of one vector.

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
        self.inputs = nn.ModuleList(
            nn.Linear(width, config.width) for width in [*config.projected_dims, *self._extra_dims]
        )
        self.norm = nn.LayerNorm(config.width)

    familiar: Tensor

    @property
    def _extra_dims(self) -> list[int]:
        """Widths of coordinates and covariates, where used."""
        return [n for n in (2 * self.config.coordinates, self.config.n_covariates) if n]

    @property
    def feature_widths(self) -> list[int]:
        """Width of each block of columns of :meth:`features`."""
        return [*self.config.aligned_dims, *self._extra_dims]

    @cached_property
    def views(self) -> list[list[range]]:
        """Columns of the features that each member of the prior sees; members take turns with the views.

        With ``standardize="auto"`` and three neighbourhoods or more, a view has the smallest neighbourhood and one of
        the others: each of these standardised by the first of ``config.statistics``, and the widest by the second, too.
        Otherwise a view has all neighbourhoods, and there is one for each of ``config.statistics``.
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

        by_section = [view(0, neighborhood) for neighborhood in wide]
        by_training = [view(1, wide[-1])] if len(config.statistics) > 1 else []
        return [*by_section[:1], *by_training, *by_section[1:]]

    @torch.no_grad()
    def fit(self, histology: Histology, sections: Tensor, moments: Mapping[int, Moments] | None = None) -> None:
        """Learn means, standard deviations within sections and principal components from training spots.

        Standardised sources are projected onto their leading principal components and divided by the projection's root
        mean square, so that the components keep their relative sizes.

        Parameters
        ----------
        histology
            Inputs of the training spots, or of a random sample of them.
        sections
            (n_spots,) number of each spot's section.
        moments
            Moments of each whole section, by its number; by default those of the given spots.
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
        # The mean of few sections lies near each of them: the squared shift of a new one is about four times theirs.
        self.familiar.copy_((4 * shifts.mean()).clamp(min=FAMILIAR))
        for k, statistics in enumerate(self.config.statistics):
            for i, source in enumerate(self._standardized(histology, sections, moments, statistics)):
                projection = getattr(self, f"projection_{i}")[k]
                projection.zero_()
                axes = torch.linalg.svd(source, full_matrices=False).Vh[: projection.shape[1]].T
                scale = (source @ axes).square().mean().sqrt().clamp(min=1e-8)
                projection[:, : axes.shape[1]] = axes / scale

    def _shift(self, mean: Tensor) -> Tensor:
        """Mean squared shift of a section's mean embedding from that of the training data."""
        return ((mean - self.get_buffer("centre_0")) / self.get_buffer("spread_0")).square().mean()

    @torch.no_grad()
    def align(self, histology: Histology, sections: Tensor, moments: Mapping[int, Moments] | None = None) -> Histology:
        """Standardise every source, project it onto its principal components, and set the novelty of each section.

        With the statistics ``"section"``, a section of n spots is standardised by means and variances of
        ``(n * own + 8 * training) / (n + 8)``, so that a section of few spots falls back on those of training.

        Parameters
        ----------
        histology
            Inputs, not yet aligned.
        sections
            (n_spots,) number of each spot's section.
        moments
            Moments of each whole section, by its number; by default those of the given spots.

        Returns
        -------
        Histology
            With sources of ``config.aligned_dims``, for :meth:`features` and ``forward``; unchanged with
            ``condition="mlp"``.
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
        """Standardise the sources section by section."""
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
        """Novelty of each spot's section, 0 to 1: (n_spots,)."""
        novelty = torch.zeros_like(histology.novelty)
        for section in sections.unique():
            own = moments[int(section)]
            shift = self._shift(own.means[0]) * own.n / (own.n + SHRINKAGE)
            novelty[sections == section] = (1 - self.familiar / shift.clamp(min=1e-12)).clamp(min=0)
        return novelty

    def _inputs(self, histology: Histology) -> list[Tensor]:
        """Sources, then coordinates and covariates where used."""
        inputs = list(histology.sources)
        if self.config.coordinates:
            inputs.append(histology.coordinates)
        if self.config.n_covariates:
            inputs.append(histology.covariates)
        return inputs

    @property
    def n_features(self) -> int:
        """Width of :meth:`features`."""
        return sum(self.feature_widths)

    def features(self, histology: Histology) -> Tensor:
        """Concatenate projected sources, coordinates and covariates of aligned spots: (n_spots, n_features)."""
        return torch.cat(self._inputs(histology), 1)

    def forward(self, histology: Histology) -> Tensor:
        """Turn the inputs of each spot into its memory.

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
            encoded = [self.histology(histology.sources[0])]
            if self.config.coordinates:
                place = histology.coordinates
                half = self.config.coordinate_dim // 2
                waves = torch.cat([sine_cosine(place[:, 0], half), sine_cosine(place[:, 1], half)], 1)
                encoded.append(self.place(place) + waves)
            return torch.cat(encoded, 1)[:, None]
        inputs = self._inputs(histology)
        n_sources = len(self.config.projected_dims)
        inputs = inputs[:n_sources] + inputs[len(histology.sources) :]
        memory = torch.stack([layer(x) for layer, x in zip(self.inputs, inputs, strict=True)], 1)
        normalised: Tensor = self.norm(memory)
        return normalised
