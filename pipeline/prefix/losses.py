"""What a trainable prefix is trained for: losses of the positions behind it, layer by layer, and of the prefix itself.

A measure is shown what passes its sites in a block, behind the prefix, and returns one number per name in `names`:

    outlier       r_t = M_t / median(M) as in `outliers.py`: excess over the threshold + LogSumExp over t (a smooth
                  maximum) + mean of the top 1 %; and smoothness, the mean step of r between consecutive positions
    quantization  the squared error of simulated static quantizers (`simulation.py`), relative to the energy of what is
                  quantized; straight-through, scales searched per batch and held constant
    l2            the energy of the attention outputs
    var           their variance over tokens

and what is to go on in place of what it saw: the same, or (quantization, `simulate`) what the quantizers leave of it,
so that everything behind, the divergence from the original above all, is that of a quantized model.

Sites are those of `sites.py`, in float32.
"""

import math
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import Site
from pipeline.prefix.outliers import outlier_ratios, token_maxima
from pipeline.prefix.params import PrefixTrainingParams
from pipeline.prefix.simulation import SimulatedQuantizers


def diversity(prefix: torch.Tensor) -> torch.Tensor:
    """Mean squared cosine similarity between different rows [P, D]; 0 for a single one."""
    if len(prefix) < 2:
        return prefix.sum() * 0.0
    normed = nn.functional.normalize(prefix, dim=-1)
    similarity = (normed @ normed.T).square()
    return (similarity.sum() - similarity.diagonal().sum()) / (len(prefix) * (len(prefix) - 1))


def magnitude(prefix: torch.Tensor, largest: float) -> torch.Tensor:
    """Mean over rows of how far the norm exceeds `largest`, relative to it."""
    return (prefix.norm(dim=-1) / largest - 1).clamp_min(0).mean()


class Measure(Protocol):
    """What a loss type is.

    Attributes:
        names: of the terms.
        sites: where it looks.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]

    def begin_batch(self) -> None:
        """Called before the first block sees a new batch."""

    def see(self, index: int, site: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes on in place of x in block `index`, and the terms [len(names)]; called twice when recomputed."""


class OutlierMeasure:
    """Terms `outlier` and `smoothness` of the ratios r [B, T] of the input of down_proj."""

    names = ("outlier", "smoothness")
    sites = (Site.MLP_HIDDEN,)

    def __init__(self, checkpoint: Checkpoint, params: PrefixTrainingParams) -> None:
        self.threshold = params.outlier_threshold

    def begin_batch(self) -> None:
        pass

    def see(self, index: int, site: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.terms(outlier_ratios(token_maxima(x)))

    def terms(self, ratios: torch.Tensor) -> torch.Tensor:
        excess = (ratios - self.threshold).clamp_min(0).mean()
        smooth_maximum = ratios.logsumexp(dim=-1).mean()
        top = ratios.topk(math.ceil(ratios.shape[-1] / 100), dim=-1).values.mean()
        smoothness = (ratios[:, 1:] - ratios[:, :-1]).abs().mean()
        return torch.stack((excess + smooth_maximum + top, smoothness))


class AttentionMeasure:
    """The attention outputs [B, T, D]: their energy (`l2`) or their variance over tokens (`var`)."""

    sites = ("o_proj",)

    def __init__(self, checkpoint: Checkpoint, params: PrefixTrainingParams) -> None:
        self.names = (params.loss_type,)

    def begin_batch(self) -> None:
        pass

    def see(self, index: int, site: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        term = x.square().mean() if self.names == ("l2",) else x.var(dim=1, correction=0).mean()
        return x, term.unsqueeze(0)


class QuantizationMeasure:
    """Term `quantization`: relative error of simulated static quantizers, as a rotated block would have them."""

    names = ("quantization",)
    sites = tuple(Site)

    def __init__(self, checkpoint: Checkpoint, params: PrefixTrainingParams) -> None:
        self.simulate = params.simulate
        self.quantizers = SimulatedQuantizers(checkpoint, params.bits, params.seed)

    def begin_batch(self) -> None:
        self.quantizers.forget()

    def see(self, index: int, site: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantizers = self.quantizers
        mean, centered, quantized = quantizers.quantize(quantizers.rotate(index, site, x), (index, site))
        error = (quantized - centered).square().sum() / centered.detach().square().sum().clamp_min(1e-30)
        return quantizers.rotate_back(index, site, quantized + mean) if self.simulate else x, error.unsqueeze(0)


MEASURES: dict[str, Any] = {
    "outlier": OutlierMeasure,
    "quantization": QuantizationMeasure,
    "l2": AttentionMeasure,
    "var": AttentionMeasure,
}
