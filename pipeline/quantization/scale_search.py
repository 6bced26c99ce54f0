"""Choose the clip factors of every quantizer by the error they cause where it matters.

Smaller factors clip the largest values and give all others a finer step; the best trade-off is not visible in the range
alone. `range:` in params.yaml names what each kind of quantizer is judged by:

    tensor   the squared error of the quantized values themselves
    layer    weights: the layer's output, tr(E H E^T) with E the weight error and H = X^T X / n, per group;
             activations: the outputs of all layers that read the site, e M e^T with M = sum of W^T W;
             keys: the attention probabilities (causal or sliding mask and prefix keys included), per key head;
             values: the attention output, per head
    block    the block's output: the whole block is run for every factor (see `block_init.py`)

Errors of layer outputs are quadratic forms of the values' errors, so that they need neither the layer nor the block to
run again: H and M are computed once, and one factor costs one fake quantization and one product on a few thousand
tokens, for all channels, heads and groups at the same time.

Every search runs over one geometric grid of factors, from 1 (the whole range) down, then in finer steps around the
best. A factor is always applied to the measured range, never to an earlier result. An asymmetric quantizer then gets
its two ends refined in turn. The coarse walk ends where no scale can be expected to improve. A single scale, where its
error is smooth (a sum over many values, of their own errors or of the outputs'), is refined only as long as it gets
better. An optimum at the very low end of the grid (0.04) means that something is wrong, and is counted and reported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

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
_FINE = tuple(_COARSE ** (fifth / 5) for fifth in (-4, -3, -2, -1, 1, 2, 3, 4))
_WORSE = 4.0  # the coarse walk ends when every scale's error exceeds its best so many times
# And that of one smooth error: clipping what stands out may cost as much as everything else together and still win by
# the finer steps of that, not more.
_WORSE_SMOOTH = 2.0
_ENDS = tuple(_COARSE ** (fifth / 5) for fifth in (-6, -4, -2, -1, 1, 2, 4, 6))
_QUERIES = 128  # per window, evenly spread, on which keys are judged

ErrorOf = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ClipSearch:
    """The outcome for one site with S scales.

    Attributes:
        factor: [S, 2] best clip factors of the low and the high end, in (0, 1]; equal unless asymmetric.
        error: [S] the error at those factors, in the units of the objective, summed over what was searched on ([1] for
            the objective `block`, which has one factor for all scales).
        reference: [S] the energy the error is compared with: that of the output without quantization.
        at_edge: how many of the optima lie at the low end of the grid.
    """

    factor: torch.Tensor
    error: torch.Tensor
    reference: torch.Tensor

    @property
    def at_edge(self) -> int:
        return int((self.factor.amin(-1) <= _COARSE**_STEPS).sum())

    @property
    def relative_error(self) -> float:
        """Error energy over output energy, all scales together; 0 where there is no energy."""
        total = self.reference.sum().item()
        return self.error.sum().item() / total if total > 0 else 0.0


@dataclass(frozen=True)
class Candidate:
    """A quantizer whose clip factors are still to be chosen, for values [..., g] with scales [...].

    Attributes:
        spec: what it is asked for.
        low, high: the range at factor 1, broadcasting to [...]; of a dynamic quantizer that of every token.
        shape: of the scales as the quantizer keeps them: [G] or [heads, 1, G] or [out, G].
        shift: what is subtracted from the samples first, broadcasting to [..., C], or None.
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
        """For samples [..., C]: a static range (`ends`, S elements each), or each token's own if `spec` is dynamic."""
        if spec.dynamic:
            centered = samples if shift is None else samples - shift
            ends = measure_range(group(centered, spec.group_size))
        else:
            ends = ends[0].view(shape), ends[1].view(shape)
        return cls(spec, *ends, shape, shift)

    @property
    def count(self) -> int:
        """S."""
        return math.prod(self.shape)

    def parameters(self, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point under factors [S, 2], or [1, 2] for all scales alike."""
        factor = factor.expand(self.count, 2).view(*self.shape, 2)
        low, high = self.low * factor[..., 0], self.high * factor[..., 1]
        return choose_parameters(low, high, self.spec.grid)

    def change(self, samples: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """What quantization under these factors adds to samples [..., C]; grouped, [..., G, g]."""
        grouped = group(samples if self.shift is None else samples - self.shift, self.spec.group_size)
        scale, zero_point = self.parameters(factor)
        zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
        return fake_quantize(grouped, scale.unsqueeze(-1), self.spec.grid, zero_point).sub_(grouped)


def search_factors(
    error_of: ErrorOf, reference: torch.Tensor, two_sided: bool = False, smooth: bool = False
) -> ClipSearch:
    """Find the factors that minimise an error, every scale by itself.

    Args:
        error_of: [S, 2] factors -> [S] errors; called at most 29 times, and 32 more when `two_sided`.
        reference: [S], see `ClipSearch`.
        two_sided: refine the factors of the low and the high end one by one after their common one is found.
        smooth: a single scale's error has one minimum within the grid's coarse step, so that fewer factors are tried.
    """
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
        best, error = _walk(error_of, best, error)
    else:
        best, error = _improve(error_of, best, error, [(best * step).clamp_max(1.0) for step in _FINE])
    for end in (0, 1, 0, 1) if two_sided else ():
        moved = torch.tensor([end == 0, end == 1], device=best.device)
        candidates = [torch.where(moved, (best * step).clamp_max(1.0), best) for step in _ENDS]
        best, error = _improve(error_of, best, error, candidates)
    return ClipSearch(best, error, reference)


def keep_range(error_of: ErrorOf, reference: torch.Tensor) -> ClipSearch:
    """The whole range (factor 1) as a result: for `range: max | percentile`."""
    ones = torch.ones(len(reference), 2, device=reference.device)
    return ClipSearch(ones, error_of(ones), reference)


def _improve(
    error_of: ErrorOf, best: torch.Tensor, error: torch.Tensor, candidates: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    for candidate in candidates:
        best, error = _keep_better(best, error, candidate, error_of(candidate))
    return best, error


def _walk(error_of: ErrorOf, start: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of `_FINE` steps around `start` for a smooth error: to the side on which it falls."""
    best = start
    for steps in (_FINE[3::-1], _FINE[4:]):
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
    better = tried < error
    return torch.where(better.unsqueeze(-1), factor, best), torch.where(better, tried, error)


def product_dtype(weights: torch.Tensor) -> torch.dtype:
    """Of products with weights that only serve to compare errors: bfloat16 where they are, otherwise float32."""
    return torch.bfloat16 if weights.dtype == torch.bfloat16 else torch.float32


def tensor_error(samples: torch.Tensor, candidate: Candidate) -> tuple[ErrorOf, torch.Tensor]:
    """The values' own squared error per scale, and their energy.

    Args:
        samples: [n, C], or [B, heads, T, d] for scales [heads, 1, G].
    """

    def energy(grouped: torch.Tensor) -> torch.Tensor:
        over = (0,) if len(candidate.shape) == 1 else (0, 2)
        return grouped.square().sum(-1).sum(over).flatten()

    return lambda factor: energy(candidate.change(samples, factor)), energy(group(samples, candidate.spec.group_size))


def activation_error(
    samples: torch.Tensor, candidate: Candidate, weights: list[torch.Tensor]
) -> tuple[ErrorOf, torch.Tensor]:
    """The squared error of the outputs of the layers that read a site, and their energy.

    Args:
        samples: [n, C] what the site sees (after R4 for mlp_hidden), a subset of all tokens.
        weights: [out, C] each, of the layers that read the site. With several groups each is judged by its own
            diagonal block of M. Products are in bfloat16 where all of them are: sums over so many tokens and outputs
            that the same factor wins.
    """
    stacked = torch.cat(weights)
    dtype = product_dtype(stacked)
    stacked = stacked.to(dtype)
    size = group(samples, candidate.spec.group_size).shape[-1]
    if size == samples.shape[-1] and len(stacked) <= size:  # ||e W^T||^2 directly is cheaper than e (W^T W) e^T

        def energy(grouped: torch.Tensor) -> torch.Tensor:
            return (grouped.squeeze(1).to(dtype) @ stacked.T).float().square().sum().reshape(1)

    else:
        moments = [(part.T @ part).to(dtype) for part in stacked.split(size, dim=1)]

        def energy(grouped: torch.Tensor) -> torch.Tensor:
            parts = ((grouped[:, i], moment) for i, moment in enumerate(moments))
            return torch.stack([((part.to(dtype) @ moment) * part).sum() for part, moment in parts])

    return lambda factor: energy(candidate.change(samples, factor)), energy(group(samples, candidate.spec.group_size))


def weight_error(
    weight: torch.Tensor, candidate: Candidate, hessian: torch.Tensor | None
) -> tuple[ErrorOf, torch.Tensor]:
    """Per output channel and group, the squared error of the layer's output, or without a Hessian the weight's own.

    Args:
        weight: [out, in] float32; the candidate's scales are [out, G].
        hessian: [in, in], mean over tokens of x^T x. Groups are judged by their own diagonal block of it: what other
            groups do to the same output is left to the rounding method.
    """
    size = group(weight, candidate.spec.group_size).shape[-1]
    blocks = None
    if hessian is not None:
        starts = range(0, weight.shape[1], size)
        blocks = torch.stack([hessian[start : start + size, start : start + size] for start in starts])

    def energy(grouped: torch.Tensor) -> torch.Tensor:
        if blocks is None:
            return grouped.square().sum(-1).flatten()
        per_group = grouped.transpose(0, 1)  # [G, out, g]
        return ((per_group @ blocks) * per_group).sum(-1).T.flatten()

    return lambda factor: energy(candidate.change(weight, factor)), energy(group(weight, candidate.spec.group_size))


def attention_error(
    queries: torch.Tensor,
    keys: torch.Tensor,
    prefix_keys: torch.Tensor | None,
    candidate: Candidate,
    scaling: float,
    turn: Callable[[torch.Tensor], torch.Tensor] = lambda keys: keys,
    cap: float | None = None,
    window: int | None = None,
) -> tuple[ErrorOf, torch.Tensor]:
    """The squared error of the attention probabilities per key head and group, and their energy.

    Args:
        queries: [B, heads, T, d], in the basis of the keys' quantizer (rotated when R3 is on).
        keys: [B, kv_heads, T, d] as the quantizer sees them. Groups are judged with the others left exact.
        prefix_keys: [kv_heads, P, d] in the basis of the queries, the positions before the text; never quantized.
        scaling: what attention multiplies the scores by.
        turn: what happens to the keys between the quantizer and the scores: RoPE when they are quantized before it.
        cap: what the scores are softly kept within (Gemma 2), or None.
        window: positions that a query sees, its own included, where the block slides, or None.
    """
    attend = _Attention(queries, keys.shape[1], prefix_keys, scaling, cap, window)
    exact = attend(turn(keys))
    groups = candidate.shape[-1]

    def error_of(factor: torch.Tensor) -> torch.Tensor:
        change = candidate.change(keys, factor)
        errors = []
        for index in range(groups):
            alone = change
            if groups > 1:
                alone = torch.zeros_like(change)
                alone[..., index, :] = change[..., index, :]
            moved = attend(turn(keys + alone.flatten(-2))).sub_(exact)
            errors.append(moved.square_().sum(dim=(0, 2, 3, 4)))
        return torch.stack(errors, dim=-1).flatten()

    return error_of, exact.square().sum(dim=(0, 2, 3, 4)).repeat_interleave(groups)


def attention_output_error(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix_keys: torch.Tensor | None,
    candidate: Candidate,
    scaling: float,
    cap: float | None = None,
    window: int | None = None,
) -> tuple[ErrorOf, torch.Tensor]:
    """The squared error that quantized values make in the attention output, per value head and group, and its energy.

    Args: as in `attention_error`; keys exact, values [B, kv_heads, T, d]. The energy leaves out the prefix's values.
    """
    attend = _Attention(queries, keys.shape[1], prefix_keys, scaling, cap, window)
    probabilities = attend(keys)[..., -keys.shape[2] :]

    def energy(grouped: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("bkats,bksd->bkatd", probabilities, grouped.flatten(-2))
        return mixed.unflatten(-1, (candidate.shape[-1], -1)).square().sum(dim=(0, 2, 3, 5)).flatten()

    return lambda factor: energy(candidate.change(values, factor)), energy(group(values, candidate.spec.group_size))


class _Attention:
    """Attention probabilities of some of the queries, [B, kv_heads, heads / kv_heads, t, P + T]; causal."""

    def __init__(
        self,
        queries: torch.Tensor,
        kv_heads: int,
        prefix_keys: torch.Tensor | None,
        scaling: float,
        cap: float | None = None,
        window: int | None = None,
    ) -> None:
        length = queries.shape[2]
        rows = torch.arange(0, length, max(1, length // _QUERIES), device=queries.device)
        # Query heads that share a key head stand next to each other.
        self.queries = queries[:, :, rows].unflatten(1, (kv_heads, -1)) * scaling
        distance = rows.unsqueeze(1) - torch.arange(length, device=queries.device)  # [t, T]
        self.hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        self.cap = cap
        self.prefix_scores = None
        if prefix_keys is not None:
            scores = self._cap(torch.einsum("bkatd,kpd->bkatp", self.queries, prefix_keys))
            if window is not None:  # the prefix slides out of sight
                count = prefix_keys.shape[1]
                distance = rows.unsqueeze(1) + count - torch.arange(count, device=queries.device)  # [t, P]
                scores = scores.masked_fill_(distance >= window, -math.inf)
            self.prefix_scores = scores

    def __call__(self, keys: torch.Tensor) -> torch.Tensor:
        scores = self._cap(torch.einsum("bkatd,bksd->bkats", self.queries, keys)).masked_fill_(self.hidden, -math.inf)
        if self.prefix_scores is not None:
            scores = torch.cat((self.prefix_scores, scores), dim=-1)
        return scores.softmax(dim=-1)

    def _cap(self, scores: torch.Tensor) -> torch.Tensor:
        return scores if self.cap is None else (scores / self.cap).tanh() * self.cap
