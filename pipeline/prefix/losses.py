"""What a trainable prefix is trained for: losses of the positions behind it, layer by layer, and of the prefix itself.

A measure is shown what passes its sites in a block, behind the prefix, and returns one number per name in `names`:

    outlier       r_t = M_t / median(M) as in `outliers.py`: excess over the threshold + LogSumExp over t (a smooth
                  maximum) + mean of the top 1 %; and smoothness, the mean step of r between consecutive positions
    quantization  the squared error of simulated static quantizers at the sites of a rotated block, relative to the
                  energy of what is quantized; straight-through, scales searched per batch and held constant
    l2            the energy of the attention outputs
    var           their variance over tokens

and what is to go on in place of what it saw: the same, or (quantization, `simulate`) what the quantizers leave of it,
so that everything behind, the divergence from the original above all, is that of a quantized model.

All sites are float32: attention_input, attention_output, mlp_input, mlp_hidden [B, T, C] as the original model has them
(norm weights included, no rotation), o_proj [B, T, D], its output, key and value [B, heads, T, d].
"""

import math
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.models.checkpoint import Checkpoint
from pipeline.numerics.hadamard import hadamard_transform, random_signs
from pipeline.numerics.quantizer import choose_parameters, fake_quantize
from pipeline.prefix.outliers import outlier_ratios, token_maxima
from pipeline.prefix.params import PrefixTrainingParams

_FACTORS = tuple(0.85**step for step in range(16))  # clip factors tried for simulated quantizers
_RESIDUAL_READERS = ("attention_input", "mlp_input")
_SAMPLED = 1 << 14  # values per scale the factors are judged on


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
    sites = ("mlp_hidden",)

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
    """Term `quantization`: relative error of simulated static quantizers, as a rotated block would have them.

    Rotations are Hadamard matrices of a seed of their own, norms' weights are folded, means kept out of the integers.
    With the seed of `rotation` the signs of R1 are the very ones the model will get, and what is learned suits them.
    Families that R1 cannot rotate are left as they are at attention_input and mlp_input.
    """

    names = ("quantization",)
    sites = ("attention_input", "key", "value", "attention_output", "mlp_input", "mlp_hidden")

    def __init__(self, checkpoint: Checkpoint, params: PrefixTrainingParams) -> None:
        self.bits, self.simulate = params.bits, params.simulate
        architecture = checkpoint.architecture
        signs = random_signs(checkpoint.config.hidden_size, torch.Generator().manual_seed(params.seed))
        self.signs = signs.float()
        folded = _RESIDUAL_READERS if architecture.rotates_residual else ()
        names = {site: f"{architecture.input_norm(site)}.weight" for site in folded}
        self.norms: list[dict[str, torch.Tensor]] = []
        for index in range(checkpoint.block_count):
            tensors = checkpoint.load_block_tensors(index) if names else {}
            self.norms.append({site: tensors[name].float() for site, name in names.items()})
        self.heads = checkpoint.config.num_attention_heads
        self._scales: dict[tuple[int, str], torch.Tensor] = {}

    def begin_batch(self) -> None:
        self._scales.clear()

    def see(self, index: int, site: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = self._rotate(index, site, x)
        quantized, error = self.quantize(turned, (index, site))
        return self._rotate_back(index, site, quantized) if self.simulate else x, error.unsqueeze(0)

    def _rotate(self, index: int, site: str, x: torch.Tensor) -> torch.Tensor:
        if site in self.norms[index]:  # a norm's weight goes into the linears behind it; a zero stays a zero
            weight = self.norms[index][site].to(x.device)
            return hadamard_transform(x / weight.where(weight != 0, 1.0) * self.signs.to(x.device))
        if site in _RESIDUAL_READERS:
            return x
        if site == "attention_output":
            return hadamard_transform(x.unflatten(-1, (self.heads, -1))).flatten(-2)
        return hadamard_transform(x)

    def _rotate_back(self, index: int, site: str, x: torch.Tensor) -> torch.Tensor:
        if site in self.norms[index]:
            return hadamard_transform(x, inverse=True) * self.signs.to(x.device) * self.norms[index][site].to(x.device)
        if site in _RESIDUAL_READERS:
            return x
        if site == "attention_output":
            return hadamard_transform(x.unflatten(-1, (self.heads, -1)), inverse=True).flatten(-2)
        return hadamard_transform(x, inverse=True)

    def quantize(self, x: torch.Tensor, key: tuple[int, str] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What a static quantizer leaves of x, and its squared error relative to the energy of x - mean.

        [B, T, C] has one scale, [B, heads, T, d] one a head. The scale found under a `key` serves the whole batch.
        """
        per_head = x.dim() == 4
        over = (0, 2) if per_head else (0, 1)
        mean = x.detach().mean(over, keepdim=True)
        centered = x - mean
        if key is None or key not in self._scales:
            values = centered.detach()
            self._scales[key] = self._search(values.movedim(1, 0).flatten(1) if per_head else values.flatten()[None])
        scale = self._scales[key]
        quantized = fake_quantize(centered, scale.view(-1, 1, 1) if per_head else scale, self.bits)
        error = (quantized - centered).square().sum() / centered.detach().square().sum().clamp_min(1e-30)
        return quantized + mean, error

    def _search(self, values: torch.Tensor) -> torch.Tensor:
        """[S, n] values -> [S] scales with the least squared error on a subset of them."""
        largest = values.abs().amax(1)
        subset = values[:, :: max(1, values.shape[1] // _SAMPLED)]
        factors = torch.tensor(_FACTORS, device=values.device)
        ends = factors.unsqueeze(1) * largest
        scales, _ = choose_parameters(-ends, ends, self.bits, symmetric=True)  # [factors, S]
        errors = (fake_quantize(subset.expand(len(factors), -1, -1), scales.unsqueeze(-1), self.bits) - subset).square()
        return scales.gather(0, errors.sum(-1).argmin(0, keepdim=True)).squeeze(0)


MEASURES: dict[str, Any] = {
    "outlier": OutlierMeasure,
    "quantization": QuantizationMeasure,
    "l2": AttentionMeasure,
    "var": AttentionMeasure,
}
