"""Simulate, at the sites of the original model, the static quantizers that a rotated model would have.

The values at a site are rotated, centered, quantized, and rotated back. Means and scales come from the first batch,
and hold until `reset`. Weights are not quantized. The rotations are Hadamard matrices, R1 with random signs, and the
weights of norms are folded as in a rotated model. With the seed of `rotation`, the signs equal the model's own
R1. In families that R1 cannot rotate, attention_input and mlp_input are not rotated. R5 is left out: with it the
candidates of the prefix search differ less, and the search chose worse (docs/lab/ablations.md).

Keys are simulated before RoPE. There a bias is a constant that centering removes. The quantizers of keys remove it too:
they quantize RoPE(k - m). RoPE only turns pairs of channels, so the part that varies is as large after it.
"""

import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import RESIDUAL_SITES, Site
from pipeline.numerics.hadamard import hadamard_transform, random_signs
from pipeline.numerics.quantizer import choose_parameters, fake_quantize

_FACTORS = tuple(0.85**step for step in range(16))  # clip factors tried
_SAMPLED = 1 << 14  # values per scale that a factor is judged on


class SimulatedQuantizers:
    """The quantizers of all blocks. The first batch after `reset` sets their means and scales."""

    def __init__(self, checkpoint: Checkpoint, bits: int, seed: int) -> None:
        """`seed` is the seed of the random signs of R1."""
        self.bits = bits
        architecture = checkpoint.architecture
        signs = random_signs(checkpoint.config.hidden_size, torch.Generator().manual_seed(seed))
        self.signs = signs.float()
        self.norms: dict[tuple[int, str], torch.Tensor] = {}
        for index in range(checkpoint.block_count) if architecture.rotates_residual else ():
            tensors = checkpoint.load_block_tensors(index)
            for site in RESIDUAL_SITES:
                self.norms[index, site] = tensors[f"{architecture.input_norm(site)}.weight"].float()
        self.heads = checkpoint.config.num_attention_heads
        self._fixed: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def reset(self) -> None:
        """Forget means and scales; the next batch sets new ones."""
        self._fixed.clear()

    def simulate(self, index: int, site: str, x: torch.Tensor) -> torch.Tensor:
        """Return x as the quantizer at a site of block `index` leaves it.

        Args:
            x: float32 [B, T, C], [n, C] or [B, heads, T, d].
        """
        mean, _, quantized = self.quantize(self.rotate(index, site, x), (index, site))
        return self.rotate_back(index, site, quantized + mean)

    def rotate(self, index: int, site: str, x: torch.Tensor) -> torch.Tensor:
        """Return the values that the rotated model would have at a site where the original has x."""
        if (index, site) in self.norms:  # its weight is folded into the linears that follow; a weight of 0 gives 0
            signs, weight = self._signs_and_norm(index, site, x.device)
            return hadamard_transform(x * (signs / weight.where(weight != 0, 1.0)))
        if site in RESIDUAL_SITES:
            return x
        if site == Site.ATTENTION_OUTPUT:
            return hadamard_transform(x.unflatten(-1, (self.heads, -1))).flatten(-2)
        return hadamard_transform(x)

    def _signs_and_norm(self, index: int, site: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the signs of R1 and the weight of the norm before a site, [D] each; they stay on the device."""
        self.signs, self.norms[index, site] = self.signs.to(device), self.norms[index, site].to(device)
        return self.signs, self.norms[index, site]

    def rotate_back(self, index: int, site: str, x: torch.Tensor) -> torch.Tensor:
        """Undo `rotate`."""
        if (index, site) in self.norms:
            signs, weight = self._signs_and_norm(index, site, x.device)
            return hadamard_transform(x, inverse=True) * (signs * weight)
        if site in RESIDUAL_SITES:
            return x
        if site == Site.ATTENTION_OUTPUT:
            return hadamard_transform(x.unflatten(-1, (self.heads, -1)), inverse=True).flatten(-2)
        return hadamard_transform(x, inverse=True)

    def quantize(
        self, x: torch.Tensor, key: tuple[int, str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the mean of each channel, x - mean, and the latter as a static quantizer leaves it.

        Args:
            x: [B, T, C], which has one scale, or [B, heads, T, d], which has one scale per head.
            key: mean and scale are kept under it, and used for later batches; None: they are measured on x.
        """
        if key is None:
            mean, scale = self._fit(x.detach())
        else:
            if key not in self._fixed:
                self._fixed[key] = self._fit(x.detach())
            mean, scale = self._fixed[key]
        centered = x - mean
        return mean, centered, fake_quantize(centered, scale, self.bits)

    def _fit(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean of each channel, and the scale, [] or [heads, 1, 1], of x - mean."""
        if x.dim() == 3:
            mean = x.mean((0, 1), keepdim=True)
            return mean, self._search((x - mean).flatten()[None])[0]
        if x.dim() == 2:
            mean = x.mean(0, keepdim=True)
            return mean, self._search((x - mean).flatten()[None])[0]
        mean = x.mean((0, 2), keepdim=True)
        return mean, self._search((x - mean).movedim(1, 0).flatten(1)).view(-1, 1, 1)

    def _search(self, values: torch.Tensor) -> torch.Tensor:
        """Return the scales [S] with the least squared error on a subset of the values [S, n]."""
        largest = values.abs().amax(1)
        subset = values[:, :: max(1, values.shape[1] // _SAMPLED)]
        factors = torch.tensor(_FACTORS, device=values.device)
        ends = factors.unsqueeze(1) * largest
        scales, _ = choose_parameters(-ends, ends, self.bits, symmetric=True)  # [factors, S]
        errors = (fake_quantize(subset.expand(len(factors), -1, -1), scales.unsqueeze(-1), self.bits) - subset).square()
        return scales.gather(0, errors.sum(-1).argmin(0, keepdim=True)).squeeze(0)
