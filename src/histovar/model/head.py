"""Between vectors and tokens: token embeddings going in, logits over the codes coming out."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn import functional as F

from .code_softmax import Normaliser, logits_in_pieces, softmax_in_pieces, tokens_at_once, two_parts
from .config import ModelConfig
from .precision import full_precision
from .vqvae import MultiScaleGeneVQVAE

# Log-weight of codes that a scale never uses: impossible, yet finite.
NEVER = -1e4
# The codes in use are filled up to a multiple of so many, for draws to search them block by block.
CODES_AT_ONCE = 64
# Standard errors by which the gate stays below its estimate: a few spots of one section must not open it by chance.
GATE_ERRORS = 2.0

# Some of the groups of a scale.
Groups = slice | Tensor


P = ParamSpec("P")
R = TypeVar("R")


def _not_autocast(
    method: Callable[Concatenate[TokenHead, Tensor, P], R],
) -> Callable[Concatenate[TokenHead, Tensor, P], R]:
    """Compute logits from codes' features in the precision of hidden states and weights, mixed precision or not.

    Large numbers cancel in them. The reference's logits are an ordinary linear layer's, and may be autocast.
    """

    @wraps(method)
    def run(self: TokenHead, hidden: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.tied:
            return method(self, hidden, *args, **kwargs)
        with full_precision(hidden.device):
            return method(self, hidden.to(self.output.weight.dtype), *args, **kwargs)

    return run  # type: ignore[return-value] # which may be called with names of arguments, too


class Expectation(NamedTuple):
    """What distributions over the codes expect of (n_spots, n) tokens.

    Parameters
    ----------
    embedding
        (n_spots, n, width): expected token embedding; None where it was not asked for.
    value, variance
        (n_spots, n, components): mean and variance of the decoded value.
    likeliest
        (n_spots, n): the most probable code.
    """

    embedding: Tensor | None
    value: Tensor
    variance: Tensor
    likeliest: Tensor


class TokenHead(nn.Module):
    r"""Logits over the codes, from hidden states and the prior.

    The logit of code :math:`c` at a token of scale :math:`k` is linear in what is known of the code, its
    codebook vector :math:`e_c` and the value :math:`u_c` it decodes to:

    .. math:: \ell_c = h^\top e_c - \tfrac12 \lVert (u_c - m) / s \rVert^2 + \log w_c

    with :math:`h` the projected hidden state, which starts at zero, :math:`m` the prior's mean of the group,
    :math:`s` its learned spread, and :math:`w_c` the volume of the code: its frequency at that scale over the
    density of all codes there (a kernel estimate with Scott's bandwidth), so that the sum over codes
    stands for an integral over values. Without a prior, :math:`w_c` is the frequency itself.

    With ``style="reference"`` token embedding and logits are the reference's free tables instead.

    Parameters
    ----------
    config
        The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size, dim = config.codebook_size, config.codebook_dim
        self.tied = config.style == "modern"
        self.embedding: nn.Module
        if not self.tied:
            self.embedding = nn.Embedding(size, config.width)
            self.output = nn.Linear(config.width, size)
        else:
            self.embedding = nn.Linear(dim, config.width)
            self.output = nn.Linear(config.width, dim)
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)
        self.register_buffer("gate", torch.ones(len(config.scales)))
        for k, (n, c) in enumerate(zip(config.scales, config.components, strict=True)):
            # Of every code: its vector, its value, the square of its value.
            self.register_buffer(f"codes_{k}", torch.zeros(size, dim + 2 * c))
            self.register_buffer(f"log_weight_{k}", torch.zeros(size))
            for name in ("used", "used_codes", "stand_in"):
                self.register_buffer(f"{name}_{k}", torch.empty(0), persistent=False)
            if self.has_prior:
                self.register_parameter(f"log_spread_{k}", nn.Parameter(torch.zeros(n, c)))
        self._select_codes()
        self.register_load_state_dict_post_hook(_select_codes)

    gate: Tensor

    @property
    def has_prior(self) -> bool:
        """Whether a conditional-mean prior shifts the logits."""
        return self.config.n_members > 0

    @torch.no_grad()
    def set_codes(self, stage1: MultiScaleGeneVQVAE) -> None:
        """Take from the trained stage 1 what each code means at each scale.

        Raises
        ------
        ValueError
            If stage 1 has not counted its codes, which is to say has not been trained.
        """
        if not stage1.code_counts.any():
            raise ValueError("stage 1 has not been trained: it has no code counts")
        codebook = stage1.quantizer.codebook
        for k in range(len(self.config.scales)):
            counts = stage1.code_counts[k]
            values = stage1.code_values(k)
            features = torch.cat([codebook, values, values.square()], 1)
            getattr(self, f"codes_{k}").copy_(features)
            if not self.tied:
                continue
            frequency = counts / counts.sum()
            log_weight = frequency.log()
            if self.has_prior:
                mean = frequency @ values
                sd = (frequency @ (values - mean).square()).sqrt().clamp(min=1e-6)
                unit = (values - mean) / sd
                distance = torch.cdist(unit, unit).square()
                bandwidth = int((counts > 0).sum()) ** (-1 / (values.shape[1] + 4))
                log_weight = log_weight - torch.logsumexp(log_weight - distance / (2 * bandwidth**2), 1)
            getattr(self, f"log_weight_{k}").copy_(torch.where(counts > 0, log_weight, NEVER))
        self._select_codes()

    @torch.no_grad()
    def _select_codes(self) -> None:
        """Set apart the codes that each scale uses, often a fifth of all: no others need logits. Untied, all are.

        Should another be a target, as it can be of spots that stage 1 was not trained on, the one of nearest value that
        is used stands in for it.
        """
        if self.gate.is_meta:  # without values, for its shapes alone
            return
        dim = self.config.codebook_dim
        for k, c in enumerate(self.config.components):
            codes, log_weight = getattr(self, f"codes_{k}"), getattr(self, f"log_weight_{k}")
            in_use = log_weight > NEVER
            used, values = torch.nonzero(in_use)[:, 0], codes[:, dim : dim + c]
            stand_in = torch.arange(len(codes), device=codes.device)
            # A tree, as a large codebook has billions of pairs.
            _, nearest = cKDTree(values[used].cpu().numpy()).query(values[~in_use].cpu().numpy())
            stand_in[~in_use] = used[torch.from_numpy(nearest).to(used.device)]
            setattr(self, f"stand_in_{k}", stand_in)
            n_filling = -len(used) % CODES_AT_ONCE
            setattr(self, f"used_{k}", F.pad(used, (0, n_filling)))
            features = F.pad(torch.cat([codes, log_weight[:, None]], 1)[used], (0, 0, 0, n_filling))
            features[len(used) :, -1] = NEVER
            setattr(self, f"used_codes_{k}", features)

    def _used(self, scale: int) -> tuple[Tensor, Tensor]:
        """Numbers of the codes that a scale uses, and their features: vector, value, its square, log-weight."""
        return self.get_buffer(f"used_{scale}"), self.get_buffer(f"used_codes_{scale}")

    @torch.no_grad()
    def set_spread(self, errors: list[Tensor]) -> None:
        """Start the prior's spread at the root mean square of its errors on training spots.

        Parameters
        ----------
        errors
            For each scale (n_spots, n_groups, components).
        """
        for k, error in enumerate(errors):
            getattr(self, f"log_spread_{k}").copy_(error.square().mean(0).clamp(min=1e-6).log() / 2)

    @staticmethod
    @torch.no_grad()
    def best_gate(values: Tensor, prior: Tensor, expected: Tensor) -> Tensor:
        r"""How far a scale's mean should move from the prior's, in [0, 1], judged on spots not trained on.

        With the error :math:`e` of the prior's mean and the shift :math:`d` that the token model proposes, least
        squares give :math:`\sum e d / \sum d^2`. The gate is that, less two of its standard errors as a ratio of sums
        over spots. The token model improves the shape of the distributions long after it has begun to spoil their
        means, so the two are decided apart.

        Parameters
        ----------
        values, prior, expected
            (n_spots, n_groups, components): decoded values of the true tokens, the prior's mean, and the mean of the
            token distributions.
        """
        shift = expected - prior
        agreement = ((values - prior) * shift).flatten(1).sum(1)
        size = shift.square().flatten(1).sum(1)
        total = size.sum().clamp(min=1e-12)
        share = agreement.sum() / total
        error = (agreement - share * size).square().sum().sqrt() / total
        return (share - GATE_ERRORS * error).clamp(0, 1)

    def embed(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Embeddings of tokens: (...) to (..., width)."""
        if not self.tied:
            free: Tensor = self.embedding(tokens)
            return free
        embedded: Tensor = self.embedding(F.embedding(tokens, codebook.to(self.output.weight.dtype)))
        return embedded

    def _embeddings(self, scale: int) -> Tensor:
        """Those of the codes that a scale uses, (n_codes, width)."""
        weight = self.embedding.get_parameter("weight")
        if not self.tied:
            return weight
        embeddings: Tensor = self.embedding(self._used(scale)[1][:, : self.config.codebook_dim].to(weight.dtype))
        return embeddings

    def values(self, tokens: Tensor, scale: int) -> Tensor:
        """Values that tokens of a scale decode to: (...) to (..., components)."""
        dim, c = self.config.codebook_dim, self.config.components[scale]
        return F.embedding(tokens, self.get_buffer(f"codes_{scale}")[:, dim : dim + c])

    def _value_terms(self, hidden: Tensor, scale: int, groups: Groups, prior: Tensor | None) -> Tensor:
        """Multipliers of a code's value, its square and its log-weight in the logits, (n_spots, n, features)."""
        ones = hidden.new_ones((), dtype=self.gate.dtype).expand(*hidden.shape[:2], 1)
        if prior is None:
            return F.pad(ones, (2 * self.config.components[scale], 0))
        precision = torch.exp(-2 * getattr(self, f"log_spread_{scale}")[groups])
        return torch.cat([prior * precision, (-precision / 2).expand_as(prior), ones], -1)

    def _query(self, hidden: Tensor, scale: int, groups: Groups, prior: Tensor | None) -> Tensor:
        """Vectors whose products with the codes' features are the logits: (n_spots, n, features)."""
        return torch.cat([self.output(hidden), self._value_terms(hidden, scale, groups, prior)], -1)

    def _operands(self, hidden: Tensor, scale: int, groups: Groups, prior: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries (n_spots, n, features) and features of the codes in use, whose products are the logits.

        The output layer is applied to hidden states or, where these are narrower than the codebook's vectors, to the
        vectors, of which there are fewer.

        In lower precision, all but the first term, where large numbers cancel, is written as products of sums of two
        numbers each, taken relative to the prior's mean and the largest log-weight.
        """
        if not self.tied:
            codes = torch.cat([self.output.weight, self.output.bias[:, None]], 1)
            return F.pad(hidden, (0, 1), value=1.0), codes
        dim, c = self.config.codebook_dim, self.config.components[scale]
        vectors, values, log_weight = self._used(scale)[1].split((dim, 2 * c, 1), 1)
        if self.config.width < dim:
            states, (weight, bias) = hidden, (p.to(vectors.dtype) for p in self.output.parameters())
            vectors, log_weight = vectors @ weight, log_weight + (vectors @ bias)[:, None]
        else:
            states = self.output(hidden)
        terms = self._value_terms(hidden, scale, groups, prior)
        if hidden.dtype == vectors.dtype:
            return torch.cat([states, terms], -1), torch.cat([vectors, values, log_weight], 1)
        others = [values, log_weight - log_weight.max()]
        if prior is not None:
            offset = (terms[..., c : 2 * c] * prior.square()).sum(-1, keepdim=True)
            terms = torch.cat([terms, offset], -1)
            others.append(torch.ones_like(log_weight))
        half = hidden.dtype
        high, low = two_parts(terms, half)
        high_codes, low_codes = two_parts(torch.cat(others, 1), half)
        query = torch.cat([states, high, low, high], -1)
        return query, torch.cat([vectors.to(half), high_codes, high_codes, low_codes], 1)

    @_not_autocast
    def logits(self, hidden: Tensor, scale: int, groups: Groups, prior: Tensor | None) -> Tensor:
        """Logits of some tokens of one scale.

        Parameters
        ----------
        hidden
            (n_spots, n, width).
        scale
            Index of the scale.
        groups
            Which n of the scale's groups.
        prior
            (n_spots, n, components): the prior's mean of these groups; None without a prior.

        Returns
        -------
        Tensor
            (n_spots, n, codebook_size).
        """
        if not self.tied:
            free: Tensor = self.output(hidden)
            return free
        codes = torch.cat([getattr(self, f"codes_{scale}"), getattr(self, f"log_weight_{scale}")[:, None]], 1)
        return F.linear(self._query(hidden, scale, groups, prior), codes)

    @torch.no_grad()
    @_not_autocast
    def expected(
        self, hidden: Tensor, scale: int, groups: Groups, prior: Tensor | None, *, embed: bool = True
    ) -> Expectation:
        """What the distribution over the codes expects; arguments as in :meth:`logits`.

        Parameters
        ----------
        hidden, scale, groups, prior
            As in :meth:`logits`.
        embed
            Whether the expected embedding is needed, too.

        Returns
        -------
        Expectation
        """
        dim, c = self.config.codebook_dim, self.config.components[scale]
        used, features = self._used(scale)
        moments_of = features[:, dim : dim + 2 * c].T.contiguous()
        embeddings_of = self._embeddings(scale).T.contiguous() if embed else None
        moments, embeddings, likeliest = [], [], []
        for logits, shares in softmax_in_pieces(*self._operands(hidden, scale, groups, prior)):
            likeliest.append(logits.max(1).indices)  # on CPUs several times as fast as argmax
            moments.append(F.linear(shares, moments_of))
            if embeddings_of is not None:
                embeddings.append(F.linear(shares.to(hidden.dtype), embeddings_of))
        shape = hidden.shape[:2]
        value, square = torch.cat(moments).view(*shape, -1).split(c, -1)
        variance = (square - value.square()).clamp(min=0)
        if prior is not None:
            value = torch.lerp(prior, value, self.gate[scale])
        embedding = torch.cat(embeddings).view(*shape, -1) if embed else None
        return Expectation(embedding, value, variance, used[torch.cat(likeliest)].view(shape))

    @torch.no_grad()
    @_not_autocast
    def likeliest(self, hidden: Tensor, scale: int, groups: Groups, prior: Tensor | None) -> Tensor:
        """The most probable codes, (n_spots, n); arguments as in :meth:`logits`."""
        codes = [logits.max(1).indices for logits in logits_in_pieces(*self._operands(hidden, scale, groups, prior))]
        return self._used(scale)[0][torch.cat(codes)].view(hidden.shape[:2])

    @_not_autocast
    def choose(
        self,
        hidden: Tensor,
        scale: int,
        groups: Groups,
        prior: Tensor | None,
        pick: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Choose tokens from their logits, tilted so that their mean is the gated mean of :meth:`expected`.

        The tilt, linear in a code's value, is one Newton step: the wanted shift over the variance.

        Parameters
        ----------
        hidden, scale, groups, prior
            As in :meth:`logits`.
        pick
            From logits (n, codebook_size) to codes (n,).

        Returns
        -------
        Tensor
            (n_spots, n).
        """
        chosen = []
        dim, c = self.config.codebook_dim, self.config.components[scale]
        used, features = self._used(scale)
        values = features[:, dim : dim + 2 * c]
        moments_of, values_of = values.T.contiguous(), values[:, :c].T.contiguous()
        query, codes = self._operands(hidden, scale, groups, prior)
        query = query.flatten(0, 1)
        n = tokens_at_once(codes)
        means = [None] * len(query) if prior is None else prior.flatten(0, 1).split(n)
        for chunk, mean in zip(query.split(n), means, strict=False):
            logits = (chunk @ codes.T).float()
            if mean is not None:
                moments = F.linear(logits.softmax(1), moments_of)
                value = moments[:, :c]
                variance = (moments[:, c:] - value.square()).clamp(min=1e-6)
                tilt = (1 - self.gate[scale]) * (mean - value) / variance
                logits.addmm_(tilt, values_of)
            chosen.append(pick(logits))
        return used[torch.cat(chosen)].view(hidden.shape[:2])

    @_not_autocast
    def loss(self, hidden: Tensor, scale: int, groups: Groups, prior: Tensor | None, tokens: Tensor) -> Tensor:
        """Cross-entropy.

        As logits are linear in a code's features, the target's needs no others; those are needed for the normaliser.

        Parameters
        ----------
        hidden, scale, groups, prior
            As in :meth:`logits`.
        tokens
            (n_spots, n).

        Returns
        -------
        Tensor
            (n_spots, n).
        """
        if not self.tied:
            return F.cross_entropy(self.output(hidden).transpose(1, 2), tokens, reduction="none")
        query = self._query(hidden, scale, groups, prior)
        normaliser: Tensor = Normaliser.apply(query, self._used(scale)[1])
        targets = self.get_buffer(f"stand_in_{scale}")[tokens]
        own_codes = F.embedding(targets, self.get_buffer(f"codes_{scale}"))
        return normaliser - (query[..., :-1] * own_codes).sum(-1) - self.get_buffer(f"log_weight_{scale}")[targets]

    @torch.no_grad()
    @_not_autocast
    def rank(self, hidden: Tensor, scale: int, groups: Groups, prior: Tensor | None, tokens: Tensor) -> Tensor:
        """How many codes are more probable than the true one; arguments and shape as in :meth:`loss`."""
        ranks = []
        codes = self._used(scale)[1] if self.tied else self.get_buffer(f"codes_{scale}")
        n_spots = max(1, tokens_at_once(codes) // tokens.shape[1])
        for start in range(0, len(tokens), n_spots):
            some = slice(start, start + n_spots)
            ids, state = tokens[some], hidden[some]
            if not self.tied:
                logits = self.output(state)
                own = logits.gather(2, ids[..., None])
            else:
                query = self._query(state, scale, groups, None if prior is None else prior[some])
                logits = query @ codes.T
                true_codes = F.embedding(ids, self.get_buffer(f"codes_{scale}"))
                true_weight = self.get_buffer(f"log_weight_{scale}")[ids]
                # A little more than rounding, for the true code not to outdo itself.
                own = ((query[..., :-1] * true_codes).sum(-1) + true_weight + 1e-4)[..., None]
            ranks.append(torch.count_nonzero(logits > own, -1))
        return torch.cat(ranks)


def _select_codes(head: TokenHead, _: object) -> None:
    """Hook after a state is loaded: select the codes that it says are in use."""
    head._select_codes()
