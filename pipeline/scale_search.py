"""Choose the clip factor of every quantizer by the error it causes where it matters.

A smaller factor clips the largest values and gives all others a finer step; the best trade-off is not visible in the
values alone. Each quantizer is therefore judged by

- weights: the error of the layer's output, tr(E H E^T) with E the weight error and H = X^T X / n, per group;
- activations: the error of the outputs of all layers that read the site, e M e^T with M = sum of W^T W;
- keys: the error of the attention probabilities (causal mask and prefix keys included), per key head;
- values: their own squared error, per head.

Every search runs over one geometric grid of factors, coarse first, then around the best: the factor is always applied
to the largest magnitude, never to an earlier result. The grid ends at 1 (no clipping, minmax) and at 0.04, so that an
optimum at the low end means something is wrong; it is counted and reported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.quantizer import choose_scale, fake_quantize, group_weight, quantize

_COARSE = torch.tensor([0.85**step for step in range(21)])  # 1 … 0.039
_FINE = torch.tensor([0.85 ** (fifth / 5) for fifth in (-4, -3, -2, -1, 1, 2, 3, 4)])


@dataclass(frozen=True)
class ClipSearch:
    """The outcome for one quantizer with S scales.

    Attributes:
        factor: [S] best clip factor, in (0, 1].
        error: [S] the error at that factor, in the units of the objective, summed over what was searched on.
        reference: [S] the energy the error is compared with: that of the output without quantization.
        at_edge: how many of the S optima lie at the low end of the grid.
    """

    factor: torch.Tensor
    error: torch.Tensor
    reference: torch.Tensor

    @property
    def at_edge(self) -> int:
        return int((self.factor <= _COARSE[-1]).sum())

    @property
    def relative_error(self) -> float:
        """Error energy over output energy, all scales together; 0 where there is no energy."""
        total = self.reference.sum().item()
        return self.error.sum().item() / total if total > 0 else 0.0


def search_factors(
    error_of: Callable[[torch.Tensor], torch.Tensor], reference: torch.Tensor, method: str
) -> ClipSearch:
    """Find the factors that minimise an error, every scale by itself.

    Args:
        error_of: [S] factors -> [S] errors; called 29 times for `mse`, once for `minmax`.
        reference: [S], see `ClipSearch`.
        method: `mse` searches, `minmax` takes factor 1.
    """
    best = torch.ones_like(reference)
    error = error_of(best)
    if method == "mse":
        best, error = _improve(error_of, best, error, [best * factor for factor in _COARSE[1:].tolist()])
        best, error = _improve(error_of, best, error, [(best * step).clamp_max(1.0) for step in _FINE.tolist()])
    return ClipSearch(best, error, reference)


def _improve(
    error_of: Callable[[torch.Tensor], torch.Tensor],
    best: torch.Tensor,
    error: torch.Tensor,
    candidates: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    for candidate in candidates:
        tried = error_of(candidate)
        better = tried < error
        best, error = torch.where(better, candidate, best), torch.where(better, tried, error)
    return best, error


def search_activation(
    samples: torch.Tensor, max_abs: torch.Tensor, weights: list[torch.Tensor], bits: int, method: str
) -> ClipSearch:
    """One factor for a site's tensor, by the squared error of the outputs of the layers that read it.

    Args:
        samples: [n, in] what the site sees (after R4 for mlp_hidden), a subset of all tokens.
        max_abs: [] the true maximum over all tokens.
        weights: [out, in] each, of the layers that read the site.
    """
    stacked = torch.cat([weight.float() for weight in weights])
    # The cheaper of two equal forms: ||e W^T||^2 directly, or e (W^T W) e^T.
    moment = stacked.T @ stacked if len(stacked) > stacked.shape[1] else None

    def energy(x: torch.Tensor) -> torch.Tensor:
        return (x @ stacked.T).square().sum() if moment is None else ((x @ moment) * x).sum()

    def error_of(factor: torch.Tensor) -> torch.Tensor:
        quantized = fake_quantize(samples, choose_scale(max_abs, bits, factor), bits)
        return energy(quantized - samples).reshape(1)

    return search_factors(error_of, energy(samples).reshape(1), method)


def search_weight(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int, method: str) -> ClipSearch:
    """A factor per output channel and group, by the squared error of the layer's output.

    Args:
        weight: [out, in] float.
        hessian: [in, in], mean over tokens of x^T x. Groups are judged by their own diagonal block of it: what other
            groups do to the same output is left to the rounding method.

    Returns:
        Factors in the order of the scales [out, G], flattened.
    """
    grouped = group_weight(weight.float(), group_size)
    out, groups, size = grouped.shape
    blocks = torch.stack(
        [hessian[start : start + size, start : start + size] for start in range(0, groups * size, size)]
    )
    max_abs = grouped.abs().amax(dim=-1)

    def energy(x: torch.Tensor) -> torch.Tensor:
        return (torch.einsum("ogi,gij->ogj", x, blocks) * x).sum(-1).flatten()

    def error_of(factors: torch.Tensor) -> torch.Tensor:
        scale = choose_scale(max_abs, bits, factors.view(out, groups)).unsqueeze(-1)
        return energy(quantize(grouped, scale, bits).mul_(scale).sub_(grouped))

    return search_factors(error_of, energy(grouped), method)


def search_keys(
    queries: torch.Tensor,
    keys: torch.Tensor,
    prefix_keys: torch.Tensor | None,
    max_abs: torch.Tensor,
    scaling: float,
    bits: int,
    method: str,
) -> ClipSearch:
    """A factor per key head, by the squared error of the attention probabilities.

    Args:
        queries: [B, heads, T, d], in the basis of the keys' quantizer (rotated when R3 is on).
        keys: [B, kv_heads, T, d] likewise.
        prefix_keys: [kv_heads, P, d] likewise, or None; attended to by every query, never quantized.
        max_abs: [kv_heads] the true maxima over all tokens.
        scaling: what attention multiplies the scores by.
    """
    _batch, kv_heads, length, _ = keys.shape
    # Query heads that share a key head stand next to each other.
    grouped = queries.unflatten(1, (kv_heads, -1)) * scaling
    causal = torch.ones(length, length, dtype=torch.bool, device=keys.device).tril()
    prefix_scores = None
    if prefix_keys is not None:
        prefix_scores = torch.einsum("bkgtd,kpd->bkgtp", grouped, prefix_keys)

    def probabilities(k: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bkgtd,bksd->bkgts", grouped, k).masked_fill_(~causal, -math.inf)
        if prefix_scores is not None:
            scores = torch.cat((prefix_scores, scores), dim=-1)
        return scores.softmax(dim=-1)

    exact = probabilities(keys)

    def error_of(factors: torch.Tensor) -> torch.Tensor:
        scale = choose_scale(max_abs, bits, factors).view(kv_heads, 1, 1)
        change = probabilities(fake_quantize(keys, scale, bits)).sub_(exact)
        return change.square_().sum(dim=(0, 2, 3, 4))

    return search_factors(error_of, exact.square().sum(dim=(0, 2, 3, 4)), method)


def search_values(values: torch.Tensor, max_abs: torch.Tensor, bits: int, method: str) -> ClipSearch:
    """A factor per head, by the values' own squared error; values [B, kv_heads, T, d], max_abs [kv_heads]."""

    def error_of(factors: torch.Tensor) -> torch.Tensor:
        scale = choose_scale(max_abs, bits, factors).view(-1, 1, 1)
        return (fake_quantize(values, scale, bits) - values).square_().sum(dim=(0, 2, 3))

    return search_factors(error_of, values.square().sum(dim=(0, 2, 3)), method)
