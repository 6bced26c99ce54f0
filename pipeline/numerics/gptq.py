"""GPTQ (arXiv:2210.17323): round a weight one input at a time, letting the inputs still to come make up for the error.

Rounding the weights w of one output changes it by d x, d = w' - w; over the calibration tokens the squared error is
d H d^T with H = mean of x^T x. With H = R R^T, R upper triangular, it is the sum over inputs k of

    (d_k R_kk + sum over j < k of d_j R_jk)^2

where inputs j < k were rounded before: input k makes its term least by rounding w_k - sum over j of d_j R_jk / R_kk.
That is the update of the paper, which gets R_jk / R_kk from the Cholesky factor of H^-1 (its inverse, and a second
factorisation, are not needed). Inputs are taken in the order of decreasing H[i, i] (activation order): the ones that
matter most are rounded while most others can still compensate. Scales are fixed beforehand, per output channel or
group, so that the order does not touch them.
"""

import logging
from dataclasses import dataclass

import torch

from pipeline.numerics.grids import Grid, as_grid
from pipeline.numerics.quantizer import dequantize, quantize

logger = logging.getLogger(__name__)

_INPUTS = 32  # taken one by one; what more of them do to later ones is one product, the same beyond summation order
_ROWS = 1024  # of a factor that are turned at a time
_RAISE, _ATTEMPTS = 10.0, 6


@dataclass(frozen=True)
class InverseFactor:
    """What GPTQ needs to know of a Hessian; layers that read the same input share it.

    Attributes:
        order: [in] inputs by decreasing diagonal.
        upper: [in, in], R of H = R R^T in that order, each column divided by its diagonal element.
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
    moved = torch.zeros(width, len(weight), device=weight.device)  # by rows in front; of those, what rounding changed
    steps, offsets = (None if t is None else t.T.contiguous() for t in (scale, zero_point))
    groups = (order * scale.shape[1] // width).tolist()
    codes = torch.empty(moved.shape, dtype=grid.code_dtype, device=moved.device)

    def round_rows(start: int, stop: int) -> None:
        if stop - start > _INPUTS:
            middle = start + (stop - start) // 2
            round_rows(start, middle)
            moved[middle:stop].addmm_(upper[start:middle, middle:stop].T, moved[start:middle], alpha=-1)
            round_rows(middle, stop)
            return
        own = weight.index_select(1, order[start:stop]).T.contiguous()  # plain indexing takes 5 times as long
        for row in range(start, stop):
            step, offset = steps[groups[row]], None if offsets is None else offsets[groups[row]]
            moved[row].addmv_(moved[start:row].T, upper[start:row, row], alpha=-1)
            rounded = quantize(own[row - start] + moved[row], step, grid, offset)
            codes[row] = grid.encode(rounded)
            torch.sub(dequantize(rounded, step, offset), own[row - start], out=moved[row])

    round_rows(0, width)
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
    backwards = order.flip(0)  # what is lower triangular backwards is upper triangular
    for _ in range(_ATTEMPTS):
        # A matrix of an MLP's width is larger than its block: one beside the Hessian, its columns together in memory
        # (they are its rows), so that LAPACK works in place.
        factor = hessian[backwards.unsqueeze(1), backwards].mT
        factor.diagonal().add_(damping * mean)
        failed = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed and torch.isfinite(torch.stack(factor.aminmax())).all():
            _turn_(factor.mT)
            return InverseFactor(order, factor.div_(factor.diagonal().clone()), damping)
        damping = max(damping, 1e-4) * _RAISE
        logger.warning("the Hessian is not positive definite; damping raised to %g of its mean diagonal", damping)
    # Nothing but the diagonal is left to trust: every input is rounded by itself.
    return InverseFactor(order, torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), damping)


def _turn_(matrix: torch.Tensor) -> None:
    """Reverse the order of rows and of columns, without a second matrix of this size."""
    count = len(matrix)
    for start in range(0, (count + 1) // 2, _ROWS):
        stop = min(start + _ROWS, (count + 1) // 2)
        first, last = matrix[start:stop], matrix[count - stop : count - start]
        turned = first.flip(0, 1)
        first.copy_(last.flip(0, 1))
        last.copy_(turned)
