"""The statistics of one site over all windows: extrema and means, a histogram, samples, and a Gram matrix."""

from dataclasses import dataclass, field

import torch

from pipeline.quantization.observers import ChannelObserver, ValueHistogram
from pipeline.runtime.ranks import Ranks

_ROWS = 256  # of a Gram matrix at a time; entries below the diagonal are computed only within these rows


@dataclass
class SiteStatistics:
    """The statistics of one site over all windows.

    Attributes:
        channels: extrema and mean of every channel, [C] or [heads, d].
        histogram: counts the values, less the channels' means where the quantizer is centered; filled only on request.
        samples: one tensor per batch: some tokens [n, C] of the linears' inputs, whole windows [B, heads, T, d] of keys
            and values.
        gram: sum over all tokens of x^T x, [C, C], for sites that a weight to be quantized reads. Only entries above
            and near the diagonal are valid. None after `take_hessian`.
    """

    channels: ChannelObserver = field(default_factory=ChannelObserver)
    histogram: ValueHistogram = field(default_factory=ValueHistogram)
    samples: list[torch.Tensor] = field(default_factory=list)
    gram: torch.Tensor | None = None

    @property
    def sample(self) -> torch.Tensor:
        """The samples of all batches."""
        return self.samples[0] if len(self.samples) == 1 else torch.cat(self.samples)

    def combine_(self, ranks: Ranks) -> None:
        """Extend all statistics but the histogram to the windows of all ranks."""
        self.channels.combine_(ranks)
        self.samples = [ranks.join(self.sample)]
        if self.gram is not None:
            ranks.sum_(self.gram)

    def add_gram_(self, tokens: torch.Tensor) -> None:
        """Add float32 tokens [n, C] to the Gram matrix."""
        width = tokens.shape[1]
        if self.gram is None:
            self.gram = tokens.new_zeros(width, width)
        for start in range(0, width, _ROWS):
            rows = slice(start, start + _ROWS)
            self.gram[rows, start:].addmm_(tokens[:, rows].T, tokens[:, start:])

    def take_hessian(self) -> torch.Tensor:
        """Return the mean over tokens of x^T x, [C, C]. It takes over the memory of `gram`, which becomes None."""
        if self.gram is None:
            raise RuntimeError("a site has no Gram matrix: no quantized weight reads it, or it was taken before")
        hessian, self.gram = self.gram.div_(self.channels.count), None
        for start in range(_ROWS, len(hessian), _ROWS):
            rows = slice(start, start + _ROWS)
            hessian[rows, :start] = hessian[:start, rows].T
        return hessian

    def center_(self, hessian: torch.Tensor) -> torch.Tensor:
        """Turn the mean of x^T x into the mean of (x - mean)^T (x - mean), in place, and return it."""
        for row, mean in zip(hessian.split(_ROWS), self.channels.mean.split(_ROWS), strict=True):
            row -= torch.outer(mean, self.channels.mean)
        return hessian
