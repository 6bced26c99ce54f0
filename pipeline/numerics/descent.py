"""Coordinate descent behind GPTQ: each input's integers are chosen again, those of all others standing as they are.

GPTQ decides about an input before it knows what becomes of the later ones. With d = w' - w the change of an output's
weights and H the Hessian (`gptq.py`), the error d H d^T is a parabola in the weight of one input k, least where that
weight is

    w'_k - (d H)_k / H_kk

so that rounding this to nearest makes the error least for the others as they are, and no step makes it greater
(QuantEase, arXiv:2309.01885, Eq. 6). H is damped as for GPTQ.
"""

import torch

from pipeline.numerics.grids import Grid, as_grid
from pipeline.numerics.quantizer import dequantize, dequantize_weight, quantize

_INPUTS = 64  # d H is computed for so many at a time, and kept up to date within them


def descend(
    weight: torch.Tensor,
    codes: torch.Tensor,
    hessian: torch.Tensor,
    damping: float,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    grid: Grid | int,
    passes: int = 2,
) -> torch.Tensor:
    """Choose every input's codes again, in order, `passes` times.

    Args:
        weight: [out, in] float32; not changed.
        codes: [out, in], where to begin; not changed.
        hessian: [in, in] float32, mean of x^T x over tokens.
        damping: the share of the mean diagonal that counts as added to it.
        scale, zero_point: [out, G] float32, G groups along the input; the zero point None when symmetric.

    Returns:
        Codes [out, in].
    """
    grid = as_grid(grid, zero_point is None)
    width = weight.shape[1]
    diagonal = hessian.diagonal()
    added = damping * diagonal.mean().clamp_min(torch.finfo(hessian.dtype).tiny)
    # Inputs are rows below, so that what is taken one by one lies together in memory.
    changed = (dequantize_weight(codes, scale, zero_point, grid) - weight).T.contiguous()
    steps, offsets = (None if t is None else t.T.contiguous() for t in (scale, zero_point))
    codes, groups = codes.T.contiguous(), width // scale.shape[1]
    for start in [*range(0, width, _INPUTS)] * passes:
        stop = min(start + _INPUTS, width)
        slope = (hessian[start:stop] @ changed).add_(added * changed[start:stop])
        own = weight[:, start:stop].T.contiguous()
        for row in range(start, stop):
            here = row - start
            step, offset = steps[row // groups], None if offsets is None else offsets[row // groups]
            best = own[here] + changed[row] - slope[here] / (diagonal[row] + added)
            rounded = quantize(best, step, grid, offset)
            codes[row] = grid.encode(rounded)
            moved = dequantize(rounded, step, offset).sub_(own[here]).sub_(changed[row])
            changed[row] += moved
            slope[here + 1 :].addr_(hessian[row, row + 1 : stop], moved)
    return codes.T.contiguous()
