"""GPTQ (arXiv:2210.17323): round a weight one input at a time, letting the inputs still to come make up for the error.

Rounding the weights w of one output changes it by (w' - w) x; over the calibration tokens the squared error is
(w' - w) H (w' - w)^T with H = mean of x^T x. After input i is rounded with error e_i, the best change of all later
inputs is -e_i · H^-1[i, later] / H^-1[i, i] (H restricted to what is left); row i of the upper Cholesky factor of H^-1
gives it for every step. Inputs are taken in the order of decreasing H[i, i] (activation order): the ones that matter
most are rounded while most others can still compensate. Scales are fixed beforehand, per output channel or group, so
that the order does not touch them.
"""

import logging
from dataclasses import dataclass

import torch

from pipeline.numerics.grids import Grid, as_grid
from pipeline.numerics.quantizer import dequantize, quantize

logger = logging.getLogger(__name__)

_INPUTS = 32  # updated together; the result does not depend on it beyond summation order
_RAISE, _ATTEMPTS = 10.0, 6


@dataclass(frozen=True)
class InverseFactor:
    """What GPTQ needs to know of a Hessian; layers that read the same input share it.

    Attributes:
        order: [in] inputs by decreasing diagonal.
        upper: [in, in], the upper Cholesky factor U of H^-1 = U^T U in that order.
        damping: the share of the mean diagonal that was really added to H.
    """

    order: torch.Tensor
    upper: torch.Tensor
    damping: float


def round_gptq(
    weight: torch.Tensor,
    factor: InverseFactor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    grid: Grid | int,
) -> torch.Tensor:
    """Round `weight` under fixed scales and zero points.

    Args:
        weight: [out, in] float32; not changed.
        factor: of the layer's Hessian.
        scale, zero_point: [out, G] float32, G groups along the input; the zero point None when symmetric.

    Returns:
        Codes [out, in], as `quantize_weight`.
    """
    grid = as_grid(grid, zero_point is None)
    width, order, upper = weight.shape[1], factor.order, factor.upper
    # Inputs are rows below, so that what is taken one by one lies together in memory.
    rest = weight.T[order]
    steps, offsets = (None if t is None else t.T.contiguous() for t in (scale, zero_point))
    groups = (order * scale.shape[1] // width).tolist()
    codes = torch.empty(rest.shape, dtype=grid.code_dtype, device=rest.device)
    for start in range(0, width, _INPUTS):
        stop = min(start + _INPUTS, width)
        errors = torch.empty_like(rest[start:stop])
        for row in range(start, stop):
            step, offset = steps[groups[row]], None if offsets is None else offsets[groups[row]]
            rounded = quantize(rest[row], step, grid, offset)
            codes[row] = grid.encode(rounded)
            error = torch.div(rest[row] - dequantize(rounded, step, offset), upper[row, row], out=errors[row - start])
            rest[row + 1 : stop] -= upper[row, row + 1 : stop].unsqueeze(1) * error
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)  # in place: no second matrix of this size
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def factor_inverse(hessian: torch.Tensor, damping: float) -> InverseFactor:
    """Prepare a Hessian for `round_gptq`.

    Args:
        hessian: [in, in] float32, mean of x^T x over tokens; inputs that are always zero may have a zero row.
        damping: H gets damping · mean(diagonal) added to its diagonal; raised tenfold, with a report, as often as the
            Cholesky factor fails.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    mean = hessian.diagonal()[order].mean().clamp_min(torch.finfo(hessian.dtype).tiny)
    for _ in range(_ATTEMPTS):
        # A matrix of an MLP's width is larger than its block: one beside the Hessian, its columns together in memory
        # (they are its rows), so that LAPACK works in place.
        factor = hessian[order.unsqueeze(1), order].mT
        factor.diagonal().add_(damping * mean)
        failed = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            torch.cholesky_inverse(factor, out=factor)
            torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
        if not failed and torch.isfinite(torch.stack(factor.aminmax())).all():
            return InverseFactor(order, factor, damping)
        damping = max(damping, 1e-4) * _RAISE
        logger.warning("the Hessian is not positive definite; damping raised to %g of its mean diagonal", damping)
    # Nothing but the diagonal is left to trust: every input is rounded by itself.
    return InverseFactor(order, torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), damping)
