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

from pipeline.quantizer import quantize

logger = logging.getLogger(__name__)

_COLUMNS = 128  # updated together; the result does not depend on it beyond summation order
_RAISE, _ATTEMPTS = 10.0, 6


@dataclass(frozen=True)
class RoundedWeight:
    """integers: int8 [out, in]; damping: the share of the mean diagonal that was really added to H."""

    integers: torch.Tensor
    damping: float


def round_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, bits: int, damping: float
) -> RoundedWeight:
    """Round `weight` under fixed scales.

    Args:
        weight: [out, in] float32; not changed.
        hessian: [in, in] float32, mean of x^T x over tokens; inputs that are always zero may have a zero row.
        scale: [out, G] float32, G groups along the input.
        damping: H gets damping · mean(diagonal) added to its diagonal; raised tenfold, with a report, as often as the
            Cholesky factor fails.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    hessian = hessian[order][:, order]
    upper, damping = _factor_inverse(hessian, damping)
    rest = weight[:, order].clone()
    scales = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)[:, order]
    integers = torch.empty_like(rest)
    for start in range(0, weight.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, weight.shape[1])
        errors = torch.empty(len(weight), stop - start, dtype=weight.dtype, device=weight.device)
        for column in range(start, stop):
            step = scales[:, column]
            integers[:, column] = quantize(rest[:, column], step, bits)
            error = (rest[:, column] - integers[:, column] * step) / upper[column, column]
            rest[:, column + 1 : stop] -= error[:, None] * upper[column, column + 1 : stop]
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    result = torch.empty_like(integers)
    result[:, order] = integers
    return RoundedWeight(result.to(torch.int8), damping)


def _factor_inverse(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor U of H^-1 = U^T U, and the damping it took."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(hessian.dtype).tiny)
    for _ in range(_ATTEMPTS):
        damped = hessian + torch.diag_embed((damping * mean).expand_as(diagonal))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            return upper, damping
        damping = max(damping, 1e-4) * _RAISE
        logger.warning("the Hessian is not positive definite; damping raised to %g of its mean diagonal", damping)
    # Nothing but the diagonal is left to trust: every input is rounded by itself.
    return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), damping
