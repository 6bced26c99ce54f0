"""Choose the clip factors of every quantizer by the error they cause where it matters.

A smaller factor clips the largest values and gives all others a finer step. The range alone does not show which factor
is best, so factors are tried. `range:` in params.yaml names the error that judges them, the objective:

    tensor   the squared error of the quantized values
    layer    weights: the layer's output, tr(E H E^T) with E the weight error and H = X^T X / n, per group;
             activations: the outputs of all layers that read the site, e M e^T with M = sum of W^T W;
             keys: the attention probabilities (causal or sliding mask and prefix keys included), per key head;
             values: the attention output, per head
    block    the block's output: the whole block runs for every factor (see `block_init.py`)

The error of a layer's output is a quadratic form of the values' errors, so that neither the layer nor the block has to
run again. H and M are computed once. One factor then costs one fake quantization and one product on a few thousand
tokens, for all channels, heads and groups at the same time.

Every search tries one geometric grid of factors, from 1 (the whole range) down, and then finer steps around the best
factor. A factor always multiplies the measured range, never an earlier result. The two ends of an asymmetric quantizer
are then refined in turn. The coarse grid ends early once no scale can be expected to improve. A single scale is refined
only as long as its error falls, if the error is smooth: a sum over many values or outputs. An optimum at the very low
end of the grid (0.04) is a sign of a mistake, so such optima are counted and reported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pipeline.numerics.quantizer import (
    QuantizerSpec,
    choose_parameters,
    fake_quantize,
    group,
    measure_range,
    require_finite,
)

_COARSE = 0.85
_STEPS = 20  # down to 0.85^20 = 0.039
_LARGER = tuple(_COARSE ** (-fifth / 5) for fifth in (1, 2, 3, 4))
_SMALLER = tuple(_COARSE ** (fifth / 5) for fifth in (1, 2, 3, 4))
_FINE = (*reversed(_LARGER), *_SMALLER)
_WORSE = 4.0  # the coarse grid ends when the error of every scale exceeds its best by this factor
# The same for one smooth error: clipping outliers may cost as much as everything else together, and the finer steps
# that it allows can win back that much but not more.
_WORSE_SMOOTH = 2.0
_ENDS = tuple(_COARSE ** (fifth / 5) for fifth in (-6, -4, -2, -1, 1, 2, 4, 6))
_QUERIES = 128  # per window, evenly spread, on which keys and values are judged

ErrorFunction = Callable[[torch.Tensor], torch.Tensor]


class Objective(NamedTuple):
    """The error that judges the clip factors of S scales.

    Attributes:
        error_of: factors [S, 2] of the low and the high end -> errors [S].
        reference: [S], the energy of the values or outputs without quantization, in the same units.
    """

    error_of: ErrorFunction
    reference: torch.Tensor


@dataclass(frozen=True)
class ClipSearch:
    """The outcome of a search for one site with S scales.

    Attributes:
        factor: [S, 2] best clip factors of the low and the high end, in (0, 1]; equal unless asymmetric.
        error: [S] the objective's errors at those factors, summed over all samples. The objective `block` has one
            factor for all scales, and its error is [1].
        reference: [S], see `Objective`.
    """

    factor: torch.Tensor
    error: torch.Tensor
    reference: torch.Tensor

    def split(self, counts: list[int]) -> "list[ClipSearch]":
        """Return the outcomes for consecutive parts of the scales."""
        parts = zip(self.factor.split(counts), self.error.split(counts), self.reference.split(counts), strict=True)
        return [ClipSearch(*part) for part in parts]

    @property
    def at_edge(self) -> int:
        """The number of optima at the low end of the grid."""
        return int((self.factor.amin(-1) <= _COARSE**_STEPS).sum())

    @property
    def relative_error(self) -> float:
        """The error over the reference energy, summed over all scales; 0 if the energy is 0."""
        total = self.reference.sum().item()
        return self.error.sum().item() / total if total > 0 else 0.0


@dataclass(frozen=True)
class Candidate:
    """A quantizer whose clip factors are still to be chosen, for values [..., g] with scales [...].

    Attributes:
        spec: the quantizer's settings.
        low, high: the range at factor 1, broadcasting to [...]; the range of every token if the quantizer is dynamic.
        shape: shape of the scales in the quantizer, [G], [heads, 1, G] or [out, G].
        shift: subtracted from the samples first, broadcasting to [..., C], or None.
    """

    spec: QuantizerSpec
    low: torch.Tensor
    high: torch.Tensor
    shape: tuple[int, ...]
    shift: torch.Tensor | None = None

    def __post_init__(self) -> None:
        require_finite(self.low, self.high)

    @classmethod
    def for_samples(
        cls,
        spec: QuantizerSpec,
        samples: torch.Tensor,
        ends: tuple[torch.Tensor, torch.Tensor],
        shape: tuple[int, ...],
        shift: torch.Tensor | None,
    ) -> "Candidate":
        """Make a candidate for samples [..., C].

        Args:
            ends: (low, high) of a static range, S elements each. A dynamic range is measured on the samples instead.
        """
        if spec.dynamic:
            centered = samples if shift is None else samples - shift
            low, high = measure_range(group(centered, spec.group_size))
        else:
            low, high = ends[0].view(shape), ends[1].view(shape)
        return cls(spec, low, high, shape, shift)

    @property
    def count(self) -> int:
        """The number of scales, S."""
        return math.prod(self.shape)

    def find_parameters(self, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scale and zero point under factors [S, 2], or under [1, 2] for all scales."""
        factor = factor.expand(self.count, 2).view(*self.shape, 2)
        low, high = self.low * factor[..., 0], self.high * factor[..., 1]
        return choose_parameters(low, high, self.spec.grid)

    def measure_change(self, samples: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Return the error that quantization with these factors adds to samples [..., C], in groups: [..., G, g]."""
        grouped = group(samples if self.shift is None else samples - self.shift, self.spec.group_size)
        scale, zero_point = self.find_parameters(factor)
        zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
        return fake_quantize(grouped, scale.unsqueeze(-1), self.spec.grid, zero_point).sub_(grouped)


def search_factors(objective: Objective, two_sided: bool = False, smooth: bool = False) -> ClipSearch:
    """Find the factors with the least error, for each scale separately.

    Args:
        objective: called at most 29 times, and 32 times more if `two_sided`.
        two_sided: refine the low and the high end separately, after their best common factor is found.
        smooth: the error of a single scale has one minimum within a coarse step of the grid, so fewer factors suffice.
    """
    error_of, reference = objective
    best = torch.ones(len(reference), 2, device=reference.device)
    error = error_of(best)
    smooth = smooth and len(reference) == 1
    worse = _WORSE_SMOOTH if smooth else _WORSE
    for step in range(1, _STEPS + 1):
        factor = torch.full_like(best, _COARSE**step)
        tried = error_of(factor)
        best, error = _keep_better(best, error, factor, tried)
        if (tried > worse * error).all():
            break
    if smooth:
        best, error = _refine_smooth(error_of, best, error)
    else:
        best, error = _refine(error_of, best, error, [(best * step).clamp_max(1.0) for step in _FINE])
    for end in (0, 1, 0, 1) if two_sided else ():
        moved = torch.tensor([end == 0, end == 1], device=best.device)
        candidates = [torch.where(moved, (best * step).clamp_max(1.0), best) for step in _ENDS]
        best, error = _refine(error_of, best, error, candidates)
    return ClipSearch(best, error, reference)


def keep_range(objective: Objective) -> ClipSearch:
    """Return the whole range (factor 1) as the outcome, for `range: max` and `range: percentile`."""
    ones = torch.ones(len(objective.reference), 2, device=objective.reference.device)
    return ClipSearch(ones, objective.error_of(ones), objective.reference)


def _refine(
    error_of: ErrorFunction, best: torch.Tensor, error: torch.Tensor, candidates: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Try all candidates [S, 2] and return the best factors and their errors."""
    for candidate in candidates:
        best, error = _keep_better(best, error, candidate, error_of(candidate))
    return best, error


def _refine_smooth(
    error_of: ErrorFunction, start: torch.Tensor, error: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow one smooth error downhill from `start` [1, 2] in fine steps; return the best factor and its error.

    Larger factors are tried first, one after the other until the error rises. Smaller factors are tried only if the
    first larger one was no better.
    """
    best = start
    for steps in (_LARGER, _SMALLER):
        for step in steps:
            factor = (start * step).clamp_max(1.0)
            tried = error_of(factor)
            if not (tried < error).item():
                break
            best, error = factor, tried
        if best is not start:
            break
    return best, error


def _keep_better(
    best: torch.Tensor, error: torch.Tensor, factor: torch.Tensor, tried: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the better of two factors [S, 2] for each scale, and its error."""
    better = tried < error
    return torch.where(better.unsqueeze(-1), factor, best), torch.where(better, tried, error)


def find_product_dtype(weights: torch.Tensor) -> torch.dtype:
    """Return the dtype for products that only compare errors: bfloat16 for bfloat16 weights, otherwise float32."""
    return torch.bfloat16 if weights.dtype == torch.bfloat16 else torch.float32


def make_tensor_objective(samples: torch.Tensor, candidate: Candidate) -> Objective:
    """Judge by the squared error of the values, per scale.

    Args:
        samples: [n, C], or [B, heads, T, d] for scales [heads, 1, G].
    """

    def sum_squares(grouped: torch.Tensor) -> torch.Tensor:
        over = (0,) if len(candidate.shape) == 1 else (0, 2)
        return grouped.square().sum(-1).sum(over).flatten()

    return Objective(
        lambda factor: sum_squares(candidate.measure_change(samples, factor)),
        sum_squares(group(samples, candidate.spec.group_size)),
    )


def make_activation_objective(samples: torch.Tensor, candidate: Candidate, weights: list[torch.Tensor]) -> Objective:
    """Judge by the squared error of the outputs of the layers that read a site, per group.

    With several groups, each is judged by its own diagonal block of M. Products are in bfloat16 if all weights are:
    summed over many tokens and outputs, the errors still select the same factor.

    Args:
        samples: [n, C] values at the site (after R4 for mlp_hidden), of some of all tokens.
        weights: [out, C] each, of the layers that read the site.
    """
    stacked = torch.cat(weights)
    dtype = find_product_dtype(stacked)
    stacked = stacked.to(dtype)
    size = group(samples, candidate.spec.group_size).shape[-1]
    if size == samples.shape[-1] and len(stacked) <= size:  # ||e W^T||^2 directly is cheaper than e (W^T W) e^T

        def sum_squares(grouped: torch.Tensor) -> torch.Tensor:
            return (grouped.squeeze(1).to(dtype) @ stacked.T).float().square().sum().reshape(1)

    else:
        moments = [(part.T @ part).to(dtype) for part in stacked.split(size, dim=1)]

        def sum_squares(grouped: torch.Tensor) -> torch.Tensor:
            parts = ((grouped[:, i], moment) for i, moment in enumerate(moments))
            return torch.stack([((part.to(dtype) @ moment) * part).sum() for part, moment in parts])

    return Objective(
        lambda factor: sum_squares(candidate.measure_change(samples, factor)),
        sum_squares(group(samples, candidate.spec.group_size)),
    )


def make_weight_objective(weight: torch.Tensor, candidate: Candidate, hessian: torch.Tensor | None) -> Objective:
    """Judge by the squared error of the layer's output, per output channel and group; without Hessian the weight's.

    Args:
        weight: [out, in] float32; the candidate's scales are [out, G].
        hessian: [in, in], mean over tokens of x^T x. Each group is judged by its own diagonal block of it. The effect
            of other groups on the same output is left to the rounding method.
    """
    size = group(weight, candidate.spec.group_size).shape[-1]
    blocks = None
    if hessian is not None:
        starts = range(0, weight.shape[1], size)
        blocks = torch.stack([hessian[start : start + size, start : start + size] for start in starts])

    def sum_squares(grouped: torch.Tensor) -> torch.Tensor:
        if blocks is None:
            return grouped.square().sum(-1).flatten()
        per_group = grouped.transpose(0, 1)  # [G, out, g]
        return ((per_group @ blocks) * per_group).sum(-1).T.flatten()

    return Objective(
        lambda factor: sum_squares(candidate.measure_change(weight, factor)),
        sum_squares(group(weight, candidate.spec.group_size)),
    )


class AttentionProbabilities:
    """Attention probabilities of some of the queries, causal, as a function of the keys.

    Calling it with keys [B, kv_heads, T, d] returns [B, kv_heads, heads / kv_heads, t, P + T], the prefix's first.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        prefix_keys: torch.Tensor | None,
        *,
        kv_heads: int,
        scaling: float,
        cap: float | None = None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Keep every few queries and compute the scores of the prefix, which never change.

        Args:
            queries: [B, heads, T, d], in the same basis as the keys (rotated if R3 is on).
            prefix_keys: [kv_heads, P, d] in that basis, or None: the positions before the text; never quantized.
            scaling: the factor of the scores.
            cap: the bound within which the scores are softly capped (Gemma 2), or None.
            window: the number of positions of prefix and text that a query reads in a sliding block, or None for all.
            sinks: a learned score of each head that has no key, [heads], or None.
        """
        length = queries.shape[2]
        rows = torch.arange(0, length, max(1, length // _QUERIES), device=queries.device)
        # Query heads that share a key head lie next to each other.
        self.queries = queries[:, :, rows].unflatten(1, (kv_heads, -1)) * scaling
        distance = rows.unsqueeze(1) - torch.arange(length, device=queries.device)  # [t, T]
        self.masked = distance < 0 if window is None else (distance < 0) | (distance >= window)
        self.cap = cap
        self.sinks = None if sinks is None else sinks.to(queries).view(1, kv_heads, -1, 1, 1)
        self.prefix_scores = None
        if prefix_keys is not None:
            scores = self._cap(torch.einsum("bkatd,kpd->bkatp", self.queries, prefix_keys))
            if window is not None:  # the prefix slides out of sight
                count = prefix_keys.shape[1]
                distance = rows.unsqueeze(1) + count - torch.arange(count, device=queries.device)  # [t, P]
                scores = scores.masked_fill_(distance >= window, -math.inf)
            self.prefix_scores = scores

    def __call__(self, keys: torch.Tensor) -> torch.Tensor:
        scores = self._cap(torch.einsum("bkatd,bksd->bkats", self.queries, keys)).masked_fill_(self.masked, -math.inf)
        if self.prefix_scores is not None:
            scores = torch.cat((self.prefix_scores, scores), dim=-1)
        if self.sinks is None:
            return scores.softmax(dim=-1)
        scores = torch.cat((self.sinks.expand(*scores.shape[:-1], 1), scores), dim=-1)
        return scores.softmax(dim=-1)[..., 1:]

    def _cap(self, scores: torch.Tensor) -> torch.Tensor:
        return scores if self.cap is None else (scores / self.cap).tanh() * self.cap


def make_key_objective(
    attend: AttentionProbabilities,
    keys: torch.Tensor,
    candidate: Candidate,
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda keys: keys,
) -> Objective:
    """Judge by the squared error of the attention probabilities, per key head and group.

    Each group is judged with the other groups unquantized.

    Args:
        keys: [B, kv_heads, T, d] that the quantizer receives.
        finish: turns quantized keys into those that `attend` takes: RoPE if they are quantized before it, or the
            addition of a part that is not quantized.
    """
    unquantized = attend(finish(keys))
    groups = candidate.shape[-1]

    def error_of(factor: torch.Tensor) -> torch.Tensor:
        change = candidate.measure_change(keys, factor)
        errors = []
        for index in range(groups):
            group_change = change
            if groups > 1:
                group_change = torch.zeros_like(change)
                group_change[..., index, :] = change[..., index, :]
            difference = attend(finish(keys + group_change.flatten(-2))).sub_(unquantized)
            errors.append(difference.square_().sum(dim=(0, 2, 3, 4)))
        return torch.stack(errors, dim=-1).flatten()

    return Objective(error_of, unquantized.square().sum(dim=(0, 2, 3, 4)).repeat_interleave(groups))


def make_value_objective(
    attend: AttentionProbabilities, keys: torch.Tensor, values: torch.Tensor, candidate: Candidate
) -> Objective:
    """Judge by the squared error of the attention output, per value head and group.

    Args:
        keys, values: [B, kv_heads, T, d], both unquantized. The reference energy leaves out the prefix's values.
    """
    probabilities = attend(keys)[..., -keys.shape[2] :]

    def sum_squares(grouped: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("bkats,bksd->bkatd", probabilities, grouped.flatten(-2))
        return mixed.unflatten(-1, (candidate.shape[-1], -1)).square().sum(dim=(0, 2, 3, 5)).flatten()

    return Objective(
        lambda factor: sum_squares(candidate.measure_change(values, factor)),
        sum_squares(group(values, candidate.spec.group_size)),
    )
