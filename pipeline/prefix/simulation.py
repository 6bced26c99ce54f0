"""Static quantizers that a rotated model would have, simulated at the sites of the original one.

What passes a site is rotated on the fly, centered, quantized with a scale searched on the first batch that passes and
held from then on, and rotated back. Weights stay as they are. Rotations are Hadamard matrices of a seed of their own,
norms' weights are folded. With the seed of `rotation` the signs of R1 are the very ones the model will get. Families
that R1 cannot rotate are left as they are at attention_input and mlp_input. R5 is left out: with it the candidates of
the prefix search lie closer together, and it chose worse (docs/ablations.md).

Keys are seen before RoPE, where a bias is a constant that centering takes out, as the quantizers of keys do (they
quantize RoPE(k - m)); behind RoPE, which only turns pairs of channels, what varies is as large.
"""

import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import RESIDUAL_SITES, Site
from pipeline.numerics.hadamard import hadamard_transform, random_signs
from pipeline.numerics.quantizer import choose_parameters, fake_quantize

_FACTORS = tuple(0.85**step for step in range(16))  # clip factors tried
_SAMPLED = 1 << 14  # values per scale the factors are judged on


class SimulatedQuantizers:
    """The quantizers of all blocks. Their means and scales are those of the first batch, until they are forgotten."""

    def __init__(self, checkpoint: Checkpoint, bits: int, seed: int) -> None:
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

    def forget(self) -> None:
        """The next batch sets means and scales anew."""
        self._fixed.clear()

    def act(self, index: int, site: str, x: torch.Tensor) -> torch.Tensor:
        """What the quantizer at a site of block `index` leaves of x, float32."""
        mean, _, quantized = self.quantize(self.rotate(index, site, x), (index, site))
        return self.rotate_back(index, site, quantized + mean)

    def rotate(self, index: int, site: str, x: torch.Tensor) -> torch.Tensor:
        """What a site of the original model would be in the rotated one."""
        if (index, site) in self.norms:  # a norm's weight goes into the linears behind it; a zero stays a zero
            signs, weight = self._signs_and_norm(index, site, x.device)
            return hadamard_transform(x * (signs / weight.where(weight != 0, 1.0)))
        if site in RESIDUAL_SITES:
            return x
        if site == Site.ATTENTION_OUTPUT:
            return hadamard_transform(x.unflatten(-1, (self.heads, -1))).flatten(-2)
        return hadamard_transform(x)

    def _signs_and_norm(self, index: int, site: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [D] on the device, where they stay."""
        self.signs, self.norms[index, site] = (t.to(device) for t in (self.signs, self.norms[index, site]))
        return self.signs, self.norms[index, site]

    def rotate_back(self, index: int, site: str, x: torch.Tensor) -> torch.Tensor:
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
        """The mean of each channel, x - mean, and what a static quantizer leaves of that.

        [B, T, C] has one scale, [B, heads, T, d] one a head. Mean and scale found under a `key` are held.
        """
        if key is None or key not in self._fixed:
            self._fixed[key] = self._fit(x.detach())
        mean, scale = self._fixed[key]
        centered = x - mean
        return mean, centered, fake_quantize(centered, scale, self.bits)

    def _fit(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of each channel, and the scale, [] or [heads, 1, 1], of what is left of x."""
        if x.dim() == 3:
            mean = x.mean((0, 1), keepdim=True)
            return mean, self._search((x - mean).flatten()[None])[0]
        mean = x.mean((0, 2), keepdim=True)
        return mean, self._search((x - mean).movedim(1, 0).flatten(1)).view(-1, 1, 1)

    def _search(self, values: torch.Tensor) -> torch.Tensor:
        """[S, n] values -> [S] scales with the least squared error on a subset of them."""
        largest = values.abs().amax(1)
        subset = values[:, :: max(1, values.shape[1] // _SAMPLED)]
        factors = torch.tensor(_FACTORS, device=values.device)
        ends = factors.unsqueeze(1) * largest
        scales, _ = choose_parameters(-ends, ends, self.bits, symmetric=True)  # [factors, S]
        errors = (fake_quantize(subset.expand(len(factors), -1, -1), scales.unsqueeze(-1), self.bits) - subset).square()
        return scales.gather(0, errors.sum(-1).argmin(0, keepdim=True)).squeeze(0)
