"""Token embeddings and the head that turns hidden states into logits over the codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn import functional as F

from .code_softmax import Normaliser, logits_in_pieces, softmax_in_pieces, split_high_low, tokens_at_once
from .config import ModelConfig
from .precision import full_precision
from .vqvae import MultiScaleGeneVQVAE

# Log-weight of codes that a scale never uses: a probability of zero, but a finite logit.
NEVER = -1e4
# The codes in use are padded to a multiple of this number, so that draws can search them block by block.
CODES_AT_ONCE = 64
# The gate is its estimate minus so many standard errors, lest a few spots of one section open it by chance.
GATE_ERRORS = 2.0

# Which groups of a scale.
Groups = slice | Tensor


P = ParamSpec("P")
R = TypeVar("R")


def _not_autocast(
    method: Callable[Concatenate[TokenHead, Tensor, P], R],
) -> Callable[Concatenate[TokenHead, Tensor, P], R]:
    """Switch autocast off in a method that computes logits from the codes' features, in which large numbers cancel.

    The reference's logits are those of an ordinary linear layer, and may be autocast.
    """

    @wraps(method)
    def run(self: TokenHead, hidden: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.tied:
            return method(self, hidden, *args, **kwargs)
        with full_precision(hidden.device):
            return method(self, hidden.to(self.output.weight.dtype), *args, **kwargs)

    return run  # type: ignore[return-value] # arguments may be passed by name, too


class Expectation(NamedTuple):
    """Expected embedding and value of (n_spots, n) tokens under their distributions over the codes.

    Parameters
    ----------
    embedding
        (n_spots, n, width): expected token embedding; None with ``embed=False``.
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
    r"""Compute logits over the codes from hidden states and the prior.

    The logit of code :math:`c` at a token of scale :math:`k` is linear in the code's features, its
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
            # Features of every code: its vector, its value, the square of its value.
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
        """Copy the codebook, and the value that each code decodes to at each scale, from the trained stage 1.

        Raises
        ------
        ValueError
            If stage 1 has no code counts, that is, has not been trained.
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
        """Build the index of the codes that each scale uses, often a fifth of all; only these need logits.

        Other codes can still be targets, in spots that stage 1 was not trained on: the used code of nearest value then
        stands in for them. With ``style="reference"`` all codes count as used.
        """
        if self.gate.is_meta:  # built for its shapes alone, without values
            return
        dim = self.config.codebook_dim
        for k, c in enumerate(self.config.components):
            codes, log_weight = getattr(self, f"codes_{k}"), getattr(self, f"log_weight_{k}")
            in_use = log_weight > NEVER
            used, values = torch.nonzero(in_use)[:, 0], codes[:, dim : dim + c]
            stand_in = torch.arange(len(codes), device=codes.device)
            # By a tree, as a large codebook has billions of pairs of codes.
            _, nearest = cKDTree(values[used].cpu().numpy()).query(values[~in_use].cpu().numpy())
            stand_in[~in_use] = used[torch.from_numpy(nearest).to(used.device)]
            setattr(self, f"stand_in_{k}", stand_in)
            n_padding = -len(used) % CODES_AT_ONCE
            setattr(self, f"used_{k}", F.pad(used, (0, n_padding)))
            features = F.pad(torch.cat([codes, log_weight[:, None]], 1)[used], (0, 0, 0, n_padding))
            features[len(used) :, -1] = NEVER
            setattr(self, f"used_codes_{k}", features)

    def _used(self, scale: int) -> tuple[Tensor, Tensor]:
        """Indices of the codes that a scale uses, and their features: vector, value, its square, log-weight."""
        return self.get_buffer(f"used_{scale}"), self.get_buffer(f"used_codes_{scale}")

    @torch.no_grad()
    def set_spread(self, errors: list[Tensor]) -> None:
        """Initialise the spread of the prior with the root mean square of its errors on training spots.

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
        r"""Estimate how far a scale's mean should move from the prior's, 0 to 1, on spots not trained on.

        With the error :math:`e` of the prior's mean and the shift :math:`d` that the token model proposes, the
        least-squares estimate is :math:`\sum e d / \sum d^2`. The gate is this estimate minus two standard errors (of
        a ratio of sums over spots). It is chosen after training, as the token model still improves the shape of the
        distributions long after it has begun to make their means worse.

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
            untied: Tensor = self.embedding(tokens)
            return untied
        embedded: Tensor = self.embedding(F.embedding(tokens, codebook.to(self.output.weight.dtype)))
        return embedded

    def _embeddings(self, scale: int) -> Tensor:
        """Token embeddings of the codes that a scale uses, (n_codes, width)."""
        weight = self.embedding.get_parameter("weight")
        if not self.tied:
            return weight
        embeddings: Tensor = self.embedding(self._used(scale)[1][:, : self.config.codebook_dim].to(weight.dtype))
        return embeddings

    def values(self, tokens: Tensor, scale: int) -> Tensor:
        """Decode tokens of a scale to group values: (...) to (..., components)."""
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

        In full precision, if there are more hidden states than codes and they are narrower than the codebook's vectors,
        the output layer is applied to the vectors and not to the hidden states.

        In half precision, large numbers would cancel in all terms but that of the codebook vectors. So these are taken
        relative to the prior's mean and the largest log-weight, and each factor is split into a high and a low part.
        """
        if not self.tied:
            codes = torch.cat([self.output.weight, self.output.bias[:, None]], 1)
            return F.pad(hidden, (0, 1), value=1.0), codes
        dim, c = self.config.codebook_dim, self.config.components[scale]
        vectors, values, log_weight = self._used(scale)[1].split((dim, 2 * c, 1), 1)
        is_full = hidden.dtype == vectors.dtype
        if is_full and self.config.width < dim and hidden.shape[:2].numel() > len(vectors):
            states, (weight, bias) = hidden, (p.to(vectors.dtype) for p in self.output.parameters())
            vectors, log_weight = vectors @ weight, log_weight + (vectors @ bias)[:, None]
        else:
            states = self.output(hidden)
        terms = self._value_terms(hidden, scale, groups, prior)
        if is_full:
            return torch.cat([states, terms], -1), torch.cat([vectors, values, log_weight], 1)
        others = [values, log_weight - log_weight.max()]
        if prior is not None:
            offset = (terms[..., c : 2 * c] * prior.square()).sum(-1, keepdim=True)
            terms = torch.cat([terms, offset], -1)
            others.append(torch.ones_like(log_weight))
        half = hidden.dtype
        high, low = split_high_low(terms, half)
        high_codes, low_codes = split_high_low(torch.cat(others, 1), half)
        query = torch.cat([states, high, low, high], -1)
        return query, torch.cat([vectors.to(half), high_codes, high_codes, low_codes], 1)

    @_not_autocast
    def logits(self, hidden: Tensor, scale: int, groups: Groups, prior: Tensor | None) -> Tensor:
        """Logits of tokens of one scale over all codes.

        Parameters
        ----------
        hidden
            (n_spots, n, width).
        scale
            Index of the scale.
        groups
            Which groups of the scale the n tokens belong to.
        prior
            (n_spots, n, components): the prior's mean of these groups; None without a prior.

        Returns
        -------
        Tensor
            (n_spots, n, codebook_size).
        """
        if not self.tied:
            untied: Tensor = self.output(hidden)
            return untied
        codes = torch.cat([getattr(self, f"codes_{scale}"), getattr(self, f"log_weight_{scale}")[:, None]], 1)
        return F.linear(self._query(hidden, scale, groups, prior), codes)

    @torch.no_grad()
    @_not_autocast
    def expected(
        self, hidden: Tensor, scale: int, groups: Groups, prior: Tensor | None, *, embed: bool = True
    ) -> Expectation:
        """Expected embedding and value, and most probable code, of tokens of one scale.

        Parameters
        ----------
        hidden, scale, groups, prior
            As in :meth:`logits`.
        embed
            Whether to compute the expected embedding.

        Returns
        -------
        Expectation
        """
        dim, c = self.config.codebook_dim, self.config.components[scale]
        used, features = self._used(scale)
        code_values = features[:, dim : dim + 2 * c].T.contiguous()
        code_embeddings = self._embeddings(scale).T.contiguous() if embed else None
        moments, embeddings, likeliest = [], [], []
        for logits, shares in softmax_in_pieces(*self._operands(hidden, scale, groups, prior)):
            likeliest.append(logits.max(1).indices)  # on CPUs several times as fast as argmax
            moments.append(F.linear(shares, code_values))
            if code_embeddings is not None:
                embeddings.append(F.linear(shares.to(hidden.dtype), code_embeddings))
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
        """Choose tokens from logits that are tilted to have the same gated mean as :meth:`expected`.

        The tilt is linear in the codes' values, and takes one Newton step: the shift of the mean over the variance.

        Parameters
        ----------
        hidden, scale, groups, prior
            As in :meth:`logits`.
        pick
            Function that chooses codes (n,) given logits (n, codebook_size).

        Returns
        -------
        Tensor
            (n_spots, n).
        """
        chosen = []
        dim, c = self.config.codebook_dim, self.config.components[scale]
        used, features = self._used(scale)
        values = features[:, dim : dim + 2 * c]
        code_moments, code_values = values.T.contiguous(), values[:, :c].T.contiguous()
        query, codes = self._operands(hidden, scale, groups, prior)
        query = query.flatten(0, 1)
        n = tokens_at_once(codes)
        means = [None] * len(query) if prior is None else prior.flatten(0, 1).split(n)
        for chunk, mean in zip(query.split(n), means, strict=False):
            logits = (chunk @ codes.T).float()
            if mean is not None:
                moments = F.linear(logits.softmax(1), code_moments)
                value = moments[:, :c]
                variance = (moments[:, c:] - value.square()).clamp(min=1e-6)
                tilt = (1 - self.gate[scale]) * (mean - value) / variance
                logits.addmm_(tilt, code_values)
            chosen.append(pick(logits))
        return used[torch.cat(chosen)].view(hidden.shape[:2])

    @_not_autocast
    def loss(self, hidden: Tensor, scale: int, groups: Groups, prior: Tensor | None, tokens: Tensor) -> Tensor:
        """Cross-entropy of true tokens.

        Logits are linear in a code's features, so the target's is computed by itself, apart from the normaliser.

        Parameters
        ----------
        hidden, scale, groups, prior
            As in :meth:`logits`.
        tokens
            (n_spots, n): the true tokens.

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
        """Rank of the true token: the number of more probable codes; arguments and shape as in :meth:`loss`."""
        ranks = []
        codes = self._used(scale)[1] if self.tied else self.get_buffer(f"codes_{scale}")
        n_spots = max(1, tokens_at_once(codes) // tokens.shape[1])
        for start in range(0, len(tokens), n_spots):
            spots = slice(start, start + n_spots)
            ids, state = tokens[spots], hidden[spots]
            if not self.tied:
                logits = self.output(state)
                own = logits.gather(2, ids[..., None])
            else:
                query = self._query(state, scale, groups, None if prior is None else prior[spots])
                logits = query @ codes.T
                true_codes = F.embedding(ids, self.get_buffer(f"codes_{scale}"))
                true_weight = self.get_buffer(f"log_weight_{scale}")[ids]
                # More than rounding errors, so that the true code does not outrank itself.
                own = ((query[..., :-1] * true_codes).sum(-1) + true_weight + 1e-4)[..., None]
            ranks.append(torch.count_nonzero(logits > own, -1))
        return torch.cat(ranks)


def _select_codes(head: TokenHead, _: object) -> None:
    """Rebuild the index of used codes after loading a state dict."""
    head._select_codes()
