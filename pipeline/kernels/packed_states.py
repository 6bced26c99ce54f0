"""Keys and values as packed codes, and back, in one pass.

    code  = clip(round((x - shift) / scale) + zero_point)            packed end to end (numerics/packing.py)
    state = ((code - zero_point) scale + shift) matrix + RoPE(mean)  `matrix` undoes R3

Each step is rounded to float32 as torch rounds it, and the terms of a product with the matrix are added one after the
other. So the states equal those of `ActivationQuantizer`, bit for bit, where torch's product adds in this order, too
(64 channels on the processors at hand). Elsewhere the last bit may differ.
"""

import torch

from pipeline.kernels.compiler import DTYPES, find_kernels
from pipeline.numerics.formats import INT
from pipeline.numerics.quantizer import ActivationQuantizer, integer_range

_LANES = 16  # as in kernels.cpp


def fits_kernels(quantizer: ActivationQuantizer, x: torch.Tensor) -> bool:
    """Return whether the operators can pack states x [B, heads, T, d], or write them into x."""
    spec = quantizer.spec
    one_scale = spec.format == INT and spec.group_size == -1 and quantizer.stores_codes
    return one_scale and x.device.type == "cpu" and x.dtype in DTYPES and find_kernels()


def pack_states(quantizer: ActivationQuantizer, x: torch.Tensor) -> torch.Tensor:
    """Return packed codes of states x [B, heads, T, d]: uint8 [B, heads, T, bytes]."""
    if not fits_kernels(quantizer, x):
        return quantizer.encode(x)
    return encode_states(quantizer, x.detach())


def encode_states(quantizer: ActivationQuantizer, x: torch.Tensor) -> torch.Tensor:
    """Return the same as `pack_states`. Only where `fits_kernels`."""
    return torch.ops.prefixquant.pack_states(x, *_describe(quantizer))


def unpack_states_(
    out: torch.Tensor,
    packed: torch.Tensor,
    first: int,
    quantizer: ActivationQuantizer,
    *,
    matrix: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> None:
    """Write states to out [B, heads, N, d], from position `first` on. Only where `fits_kernels`.

    Args:
        packed: uint8 [B, heads, T, bytes].
        matrix: float32 [d, d], d a multiple of 16.
        mean: float32 [heads, d], added after the matrix; turned by RoPE if there are `places`.
        places: int32 [B or 1, T], rows of `table`.
        table: float32 [positions, d], d / 2 cosines and then as many sines.
    """
    torch.ops.prefixquant.unpack_states(out, packed, first, *_describe(quantizer), matrix, mean, places, table)


def takes_matrix(width: int) -> bool:
    """Return whether the operators can multiply heads of this width by a matrix."""
    return width % _LANES == 0


def _describe(
    quantizer: ActivationQuantizer,
) -> tuple[int, int, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    spec = quantizer.spec
    lowest, _ = integer_range(spec.bits, spec.symmetric)
    zero_point = None if spec.symmetric else quantizer.zero_point
    return spec.bits, lowest, quantizer.scale, zero_point, quantizer.shift if spec.centered else None
