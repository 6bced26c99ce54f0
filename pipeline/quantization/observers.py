"""Observe the range, the mean and the distribution of the values at a site, batch by batch.

Extrema and histograms are exact: batches and their order make no difference, to the last bit. (An exponential moving
average, as often used, depends on the order: its first sample weighs most.) Means are summed in float64.
"""

import torch

from pipeline.numerics.quantizer import group
from pipeline.runtime.ranks import Ranks

_BINS = 1 << 16


class ChannelObserver:
    """Minimum, maximum and mean of every channel.

    Attributes:
        low, high: [*channels] float32, true extrema; not set before the first update.
        total: [*channels] float64, the sum of the values; not set before the first update.
        count: the number of tokens.
    """

    def __init__(self) -> None:
        self.low: torch.Tensor
        self.high: torch.Tensor
        self.total: torch.Tensor
        self.count = 0

    def update(self, values: torch.Tensor) -> None:
        """Add values [n, *channels]."""
        low, high = torch.aminmax(values, dim=0)
        total = values.sum(dim=0, dtype=torch.float64)
        if self.count:
            low, high, total = torch.minimum(low, self.low), torch.maximum(high, self.high), total + self.total
        self.low, self.high, self.total = low.float(), high.float(), total
        self.count += len(values)

    def prepare_(self, width: int, device: torch.device) -> None:
        """Give an observer of [width] channels that got no values tensors that change no other rank's."""
        if not self.count:
            self.low, self.high = (torch.full((width,), end, device=device) for end in (torch.inf, -torch.inf))
            self.total = torch.zeros(width, dtype=torch.float64, device=device)

    def combine_(self, ranks: Ranks) -> None:
        """Extend the statistics to the tokens of all ranks."""
        ranks.sum_(self.total)
        ranks.min_(self.low)
        ranks.max_(self.high)
        self.count = ranks.count(self.count)

    @property
    def mean(self) -> torch.Tensor:
        """The mean of each channel, [*channels] float32."""
        return (self.total / self.count).float()

    def find_range(self, group_size: int, shift: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (low, high) of every group of channels after `shift` [*channels] is subtracted; low <= 0 <= high.

        Example: channels [heads, d], group_size d / 2 -> low and high [heads, 2].
        """
        low, high = (self.low, self.high) if shift is None else (self.low - shift, self.high - shift)
        low, high = group(low, group_size).amin(-1), group(high, group_size).amax(-1)
        return low.clamp_max(0), high.clamp_min(0)


class ValueHistogram:
    """The distribution of S groups of values, from which percentiles are read.

    There is one bin for every bfloat16 number. No range has to be known beforehand, and values of any size are resolved
    to 1 part in 256.

    Attributes:
        counts: [S, 65536] int64, the number of values at each bfloat16 number in ascending order; None when empty.
    """

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None

    def update(self, values: torch.Tensor) -> None:
        """Add values [n, S, g]."""
        bits = values.bfloat16().view(torch.int16).long()
        # Negative numbers have their sign bit set and descend; positive numbers follow them and ascend.
        bins = torch.where(bits < 0, -1 - (bits + (_BINS >> 1)), bits) + (_BINS >> 1)
        groups = values.shape[1]
        bins += torch.arange(groups, device=values.device).view(1, -1, 1) * _BINS
        counts = torch.bincount(bins.flatten(), minlength=groups * _BINS).view(groups, _BINS)
        self.counts = counts if self.counts is None else self.counts.add_(counts)

    def require_counts(self) -> torch.Tensor:
        """Return `counts`.

        Raises:
            RuntimeError: there are none, because no value was counted.
        """
        if self.counts is None:
            raise RuntimeError("a histogram is empty: no value was counted")
        return self.counts

    def find_range(self, percentile: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (low, high) [S]: `percentile` % of the values are <= high, as many are >= low; low <= 0 <= high."""
        counts = self.require_counts()
        numbers = _bfloat16_numbers(counts.device)
        total = counts.sum(dim=1, keepdim=True)
        below = counts.cumsum(dim=1)
        wanted = torch.ceil(total.double() * percentile / 100)
        high = numbers[(below >= wanted).int().argmax(dim=1)]
        low = numbers[(below > total - wanted).int().argmax(dim=1)]
        return low.clamp_max(0), high.clamp_min(0)


def _bfloat16_numbers(device: torch.device) -> torch.Tensor:
    """Return every bfloat16 number in ascending order, as float32."""
    index = torch.arange(_BINS, device=device) - (_BINS >> 1)
    bits = torch.where(index < 0, -1 - index - (_BINS >> 1), index).to(torch.int16)
    return bits.view(torch.bfloat16).float()
