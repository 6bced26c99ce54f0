"""What a trainable prefix is trained for: losses of the positions behind it, layer by layer, and of the prefix itself.

A measure is called with the index of a block and what the block's sites see behind the prefix, and returns one number
per name in `names`:

    outlier       r_t = M_t / median(M) as in `outliers.py`: excess over the threshold + LogSumExp over t (a smooth
                  maximum) + mean of the top 1 %; and smoothness, the mean step of r between consecutive positions
    quantization  the squared error of simulated static quantizers at the sites of a rotated block, relative to the
                  energy of what is quantized; straight-through, scales searched per batch and held constant
    l2            the energy of the attention outputs
    var           their variance over tokens

All sites are float32: attention_input, attention_output, mlp_input, mlp_hidden [B, T, C] as the original model has them
(norm weights included, no rotation), o_proj [B, T, D], its output, key and value [B, heads, T, d].
"""

import math
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint import Checkpoint
from pipeline.hadamard import hadamard_transform, random_signs
from pipeline.outliers import outlier_ratios, token_maxima
from pipeline.params import PrefixTrainingParams
from pipeline.quantizer import choose_parameters, fake_quantize

_FACTORS = tuple(0.85**step for step in range(16))  # clip factors tried for simulated quantizers
_SAMPLED = 1 << 15  # values per scale the factors are judged on


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


class OutlierMeasure:
    """Terms `outlier` and `smoothness` of the ratios r [B, T] of the input of down_proj."""

    names = ("outlier", "smoothness")

    def __init__(self, checkpoint: Checkpoint, params: PrefixTrainingParams) -> None:
        self.threshold = params.outlier_threshold

    def __call__(self, index: int, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.terms(outlier_ratios(token_maxima(seen["mlp_hidden"])))

    def terms(self, ratios: torch.Tensor) -> torch.Tensor:
        excess = (ratios - self.threshold).clamp_min(0).mean()
        smooth_maximum = ratios.logsumexp(dim=-1).mean()
        top = ratios.topk(math.ceil(ratios.shape[-1] / 100), dim=-1).values.mean()
        smoothness = (ratios[:, 1:] - ratios[:, :-1]).abs().mean()
        return torch.stack((excess + smooth_maximum + top, smoothness))


class AttentionMeasure:
    """The attention outputs [B, T, D]: their energy (`l2`) or their variance over tokens (`var`)."""

    def __init__(self, checkpoint: Checkpoint, params: PrefixTrainingParams) -> None:
        self.names = (params.loss_type,)

    def __call__(self, index: int, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        x = seen["o_proj"]
        term = x.square().mean() if self.names == ("l2",) else x.var(dim=1, correction=0).mean()
        return term.unsqueeze(0)


class QuantizationMeasure:
    """Term `quantization`: relative error of simulated static quantizers, as a rotated block would have them.

    Rotations are Hadamard matrices of a seed of their own, norms' weights are folded, means kept out of the integers.
    """

    names = ("quantization",)

    def __init__(self, checkpoint: Checkpoint, params: PrefixTrainingParams) -> None:
        self.bits = params.bits
        architecture = checkpoint.architecture
        signs = random_signs(checkpoint.config.hidden_size, torch.Generator().manual_seed(params.seed))
        self.signs = signs.float()
        names = {"attention_input": architecture.attention_norm, "mlp_input": architecture.mlp_norm}
        self.norms = [
            {site: checkpoint.load_block_tensors(index)[f"{name}.weight"].float() for site, name in names.items()}
            for index in range(checkpoint.block_count)
        ]
        self.heads = checkpoint.config.num_attention_heads

    def __call__(self, index: int, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        errors = []
        for site, weight in self.norms[index].items():
            x, weight = seen[site], weight.to(seen[site].device)
            plain = x / weight.where(weight != 0, 1.0)
            errors.append(self.error(hadamard_transform(plain * self.signs.to(x.device))))
        per_head = seen["attention_output"].unflatten(-1, (self.heads, -1))
        errors.append(self.error(hadamard_transform(per_head).flatten(-2)))
        errors.append(self.error(hadamard_transform(seen["mlp_hidden"])))
        errors += [self.error(hadamard_transform(seen[site]), heads=True) for site in ("key", "value")]
        return torch.stack(errors).mean().unsqueeze(0)

    def error(self, x: torch.Tensor, heads: bool = False) -> torch.Tensor:
        """Relative squared error of a static quantizer: [B, T, C] with one scale, [B, heads, T, d] with one a head."""
        over = (0, 2) if heads else (0, 1)
        with torch.no_grad():
            mean = x.mean(over, keepdim=True)
            values = (x - mean).movedim(1, 0).flatten(1) if heads else (x - mean).flatten().unsqueeze(0)
            scale = self._search(values)
            scale = scale.view(-1, 1, 1) if heads else scale
        centered = x - mean
        quantized = fake_quantize(centered, scale, self.bits)
        return (quantized - centered).square().sum() / centered.detach().square().sum().clamp_min(1e-30)

    def _search(self, values: torch.Tensor) -> torch.Tensor:
        """[S, n] values -> [S] scales with the least squared error on a subset of them."""
        largest = values.abs().amax(1)
        subset = values[:, :: max(1, values.shape[1] // _SAMPLED)]
        best, least = None, None
        for factor in _FACTORS:
            scale, _ = choose_parameters(-largest * factor, largest * factor, self.bits, symmetric=True)
            error = (fake_quantize(subset, scale.unsqueeze(1), self.bits) - subset).square().sum(1)
            better = None if least is None else error < least
            best = scale if best is None else torch.where(better, scale, best)
            least = error if least is None else torch.where(better, error, least)
        return best


MEASURES: dict[str, Any] = {
    "outlier": OutlierMeasure,
    "quantization": QuantizationMeasure,
    "l2": AttentionMeasure,
    "var": AttentionMeasure,
}
