"""Terms of the loss of a trainable prefix, for the positions after it, layer by layer, and for the prefix itself.

A measure gets the values at its sites in a block, float32, without the prefix positions. It returns terms, one number
per name in `names`:

    outlier       of r_t = M_t / median(M) as in `outliers.py`: excess over the threshold + LogSumExp over t (a smooth
                  maximum) + mean of the top 1 %; and smoothness, the mean step of r between consecutive positions
    quantization  the squared error of simulated static quantizers (`simulation.py`), relative to the energy of the
                  values; straight-through, with scales that are searched per batch and constant in it
    l2            the energy of the attention outputs
    var           the variance of the attention outputs over tokens

It also returns the values that the block goes on with. With `prefix_training.simulate`, these are the quantized values,
so that later blocks, and the divergence from the original, belong to a quantized model.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import Site
from pipeline.prefix.outliers import outlier_ratios, token_maxima
from pipeline.prefix.params import PrefixTrainingParams
from pipeline.prefix.simulation import SimulatedQuantizers
from pipeline.prefix.sites import ATTENTION_RESULT


def diversity(prefix: torch.Tensor) -> torch.Tensor:
    """Return the mean squared cosine similarity between different rows of [P, D]; 0 for a single row."""
    if len(prefix) < 2:
        return prefix.sum() * 0.0
    normed = nn.functional.normalize(prefix, dim=-1)
    similarity = (normed @ normed.T).square()
    return (similarity.sum() - similarity.diagonal().sum()) / (len(prefix) * (len(prefix) - 1))


def magnitude(prefix: torch.Tensor, largest: float) -> torch.Tensor:
    """Return the mean over rows of [P, D] of the part of the norm beyond `largest`, relative to `largest`."""
    return (prefix.norm(dim=-1) / largest - 1).clamp_min(0).mean()


class Measure(Protocol):
    """The terms of one loss type.

    Attributes:
        names: names of the terms.
        sites: whose values it measures.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]

    def begin_batch(self) -> None:
        """Prepare for a new batch; called before its first block."""

    def measure(self, index: int, site: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values that block `index` goes on with in place of x, and the terms [len(names)].

        Called twice for each batch where blocks run again for the backward pass.
        """
        ...


class OutlierMeasure:
    """Measures the terms `outlier` and `smoothness` of the ratios r [B, T] of the input of down_proj."""

    names: tuple[str, ...] = ("outlier", "smoothness")
    sites: tuple[str, ...] = (Site.MLP_HIDDEN,)

    def __init__(self, checkpoint: Checkpoint, params: PrefixTrainingParams) -> None:
        self.threshold = params.outlier_threshold

    def begin_batch(self) -> None:
        pass

    def measure(self, index: int, site: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.terms(outlier_ratios(token_maxima(x)))

    def terms(self, ratios: torch.Tensor) -> torch.Tensor:
        """Return outlier and smoothness, [2], of ratios [B, T]."""
        excess = (ratios - self.threshold).clamp_min(0).mean()
        smooth_maximum = ratios.logsumexp(dim=-1).mean()
        top = ratios.topk(math.ceil(ratios.shape[-1] / 100), dim=-1).values.mean()
        smoothness = (ratios[:, 1:] - ratios[:, :-1]).abs().mean()
        return torch.stack((excess + smooth_maximum + top, smoothness))


class AttentionMeasure:
    """Measures the energy (`l2`) or the variance over tokens (`var`) of the attention outputs [B, T, D]."""

    sites: tuple[str, ...] = (ATTENTION_RESULT,)

    def __init__(self, checkpoint: Checkpoint, params: PrefixTrainingParams) -> None:
        self.names: tuple[str, ...] = (params.loss_type,)

    def begin_batch(self) -> None:
        pass

    def measure(self, index: int, site: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        term = x.square().mean() if self.names == ("l2",) else x.var(dim=1, correction=0).mean()
        return x, term.unsqueeze(0)


class QuantizationMeasure:
    """Measures the term `quantization`, the relative error of the simulated static quantizers of a rotated block."""

    names: tuple[str, ...] = ("quantization",)
    sites: tuple[str, ...] = tuple(Site)

    def __init__(self, checkpoint: Checkpoint, params: PrefixTrainingParams) -> None:
        self.simulate = params.simulate
        self.quantizers = SimulatedQuantizers(checkpoint, params.bits, params.seed)

    def begin_batch(self) -> None:
        self.quantizers.reset()

    def measure(self, index: int, site: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantizers = self.quantizers
        mean, centered, quantized = quantizers.quantize(quantizers.rotate(index, site, x), (index, site))
        error = (quantized - centered).square().sum() / centered.detach().square().sum().clamp_min(1e-30)
        return quantizers.rotate_back(index, site, quantized + mean) if self.simulate else x, error.unsqueeze(0)


MEASURES: dict[str, Callable[[Checkpoint, PrefixTrainingParams], Measure]] = {
    "outlier": OutlierMeasure,
    "quantization": QuantizationMeasure,
    "l2": AttentionMeasure,
    "var": AttentionMeasure,
}
