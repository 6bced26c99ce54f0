"""GPTQ (arXiv:2210.17323): round a weight one input at a time, so that later inputs compensate for the error.

Rounding the weights w of one output changes this output by d x, with d = w' - w. Its mean squared error over the
calibration tokens is d H d^T, with H = mean of x^T x. Let H = R R^T, with R upper triangular. Then the error is the sum
over inputs k of

    (d_k R_kk + sum over j < k of d_j R_jk)^2

Inputs j < k are rounded before input k. So the term of input k is smallest if the rounded value is
w_k - sum over j < k of d_j R_jk / R_kk. This is the update of the paper, which takes R_jk / R_kk from the Cholesky
factor of H^-1. Here neither that inverse nor a second factorization is needed.

Inputs are taken in the order of decreasing H[i, i] (activation order). The most important ones are then rounded while
most others can still compensate. Scales are fixed beforehand, per output channel or group, so the order does not affect
them.

Shapes: `in` inputs, `out` outputs, G groups along the input, n inputs that are rounded one by one.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pipeline.numerics.grids import Grid, StoredGrid, as_stored_grid
from pipeline.numerics.quantizer import dequantize, dequantize_weight, quantize

logger = logging.getLogger(__name__)

_INPUTS = 32  # rounded one by one; of more inputs, half update the rest by one product (another order of summation)
_ROWS = 1024  # of a factor that are turned at a time
_DAMPING_STEP, _ATTEMPTS = 10.0, 6


@dataclass(frozen=True)
class InverseFactor:
    """A Hessian prepared for `round_gptq`. All layers that read the same input can use it.

    Attributes:
        order: [in], the inputs by decreasing diagonal element of H.
        upper: [in, in], R of H = R R^T in that order, each column divided by its diagonal element.
        damping: the multiple of the mean diagonal that was added to H in the end.
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
    """Round `weight` with fixed scales and zero points.

    Args:
        weight: [out, in] float32; not changed.
        factor: factor of the layer's Hessian.
        scale, zero_point: [out, G] float32; the zero point is None if symmetric.
        grid: the values to round to, or the bits of integers.

    Returns:
        Codes [out, in], as from `quantize_weight`.
    """
    rounding = _Rounding(weight, factor, scale, zero_point, as_stored_grid(grid, zero_point is None))
    rounding.round_(0, weight.shape[1])
    result = torch.empty_like(rounding.codes)
    result[factor.order] = rounding.codes
    return result.T.contiguous()


def measure_offsets(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    grid: Grid | int,
    factor: InverseFactor | None = None,
) -> torch.Tensor:
    """Return the value that each weight had right before it was rounded, less the value it was rounded to, in steps.

    Args:
        weight: [out, in] float32, before any rounding.
        codes: [out, in], as `round_gptq` returns them.
        scale, zero_point: [out, G] float32; the zero point is None if symmetric.
        grid: the values that were rounded to.
        factor: the factor that `round_gptq` used; None: each weight was rounded to nearest.

    Returns:
        [out, in] float32. Within half a step of zero, except for values beyond the range.
    """
    stored = as_stored_grid(grid, zero_point is None)
    change = dequantize_weight(codes, scale, zero_point, stored).sub_(weight)
    correction: torch.Tensor | float = 0.0
    if factor is not None:
        moved = factor.upper.triu(1).T @ change.T[factor.order]
        correction = torch.empty_like(moved)
        correction[factor.order] = moved
        correction = correction.T
    return (change + correction).neg_().reshape(*scale.shape, -1).div_(scale.unsqueeze(-1)).reshape(weight.shape)


class _Rounding:
    """The rounding of one weight. Rows are inputs in the factor's order, so that each input is contiguous in memory.

    Attributes:
        scales, zero_points: [G, out].
        groups: [in], the group of each input.
        moved: [in, out]. Before input k is rounded: the correction by the inputs before it. Afterwards: d_k.
        codes: [in, out].
    """

    def __init__(
        self,
        weight: torch.Tensor,
        factor: InverseFactor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        grid: StoredGrid,
    ) -> None:
        self.weight, self.factor, self.grid = weight, factor, grid
        out, width = weight.shape
        self.scales = scale.T.contiguous()
        self.zero_points = None if zero_point is None else zero_point.T.contiguous()
        self.groups = factor.order * scale.shape[1] // width
        self.moved = torch.zeros(width, out, device=weight.device)
        self.codes = torch.empty(self.moved.shape, dtype=grid.code_dtype, device=weight.device)
        self.recorded = _record_rounding(out, grid, zero_point is not None, weight.device) if weight.is_cuda else None

    def round_(self, start: int, stop: int) -> None:
        """Round inputs start to stop. All inputs before them are done, and `moved` holds their corrections."""
        upper, moved, rows = self.factor.upper, self.moved, slice(start, stop)
        if stop - start > _INPUTS:
            half = (stop - start) // 2
            if self.recorded is not None:  # full groups, as recorded
                half = _INPUTS * math.ceil(half / _INPUTS)
            middle = start + half
            self.round_(start, middle)
            moved[middle:stop].addmm_(upper[start:middle, middle:stop].T, moved[start:middle], alpha=-1)
            self.round_(middle, stop)
            return
        # Plain indexing would take 5 times as long.
        values = self.weight.index_select(1, self.factor.order[rows]).T.contiguous()
        groups = self.groups[rows]
        scale = _take(self.scales, groups)
        zero_point = None if self.zero_points is None else _take(self.zero_points, groups)
        round_inputs_ = self.recorded or _round_inputs_
        round_inputs_(_Inputs(values, moved[rows], upper[rows, rows], scale, zero_point), self.grid)
        self.codes[rows] = self.grid.encode(values)


def _take(parameters: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return the rows of parameters [G, out] for n inputs, given their groups [n]: [n, out]."""
    if len(parameters) == 1:
        return parameters.expand(len(groups), -1)
    return parameters.index_select(0, groups)


class _Inputs(NamedTuple):
    """n inputs that are rounded one by one.

    Attributes:
        values: [n, out], their weights; replaced by values of the grid.
        moved: [n, out], the corrections by the inputs before them; replaced by d.
        upper: [n, n], their part of the factor.
        scale, zero_point: [n, out].
    """

    values: torch.Tensor
    moved: torch.Tensor
    upper: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None


def _round_inputs_(inputs: _Inputs, grid: Grid) -> None:
    values, moved, upper, scale, zero_points = inputs
    for row in range(len(values)):
        moved[row].addmv_(moved[:row].T, upper[:row, row], alpha=-1)
        zero_point = None if zero_points is None else zero_points[row]
        rounded = quantize(values[row] + moved[row], scale[row], grid, zero_point)
        torch.sub(dequantize(rounded.clone(), scale[row], zero_point), values[row], out=moved[row])
        values[row] = rounded


class _RecordedRounding:
    """`_round_inputs_` as a CUDA graph. Launched one by one, its small operations take 5 to 9 times as long."""

    def __init__(self, out: int, grid: Grid, has_zero_point: bool, device: torch.device) -> None:
        values, moved, scale = (torch.zeros(_INPUTS, out, device=device) for _ in range(3))
        upper = torch.zeros(_INPUTS, _INPUTS, device=device)
        zero_point = torch.zeros_like(values) if has_zero_point else None
        self.buffers = _Inputs(values, moved, upper, scale.fill_(1), zero_point)
        self.replay = record_launches(lambda: _round_inputs_(self.buffers, grid), device)

    def __call__(self, inputs: _Inputs, grid: Grid) -> None:
        """Do the same as `_round_inputs_`, for at most _INPUTS inputs. Unused rows come last and affect no other."""
        count = len(inputs.values)
        for buffer, tensor in zip(self.buffers, inputs, strict=True):
            if buffer is not None and tensor is not None:
                buffer[:count, : tensor.shape[1]] = tensor
        self.replay()
        inputs.values.copy_(self.buffers.values[:count])
        inputs.moved.copy_(self.buffers.moved[:count])


@functools.lru_cache(maxsize=16)
def _record_rounding(out: int, grid: Grid, has_zero_point: bool, device: torch.device) -> _RecordedRounding:
    """Record the rounding once for all weights of a shape, because recording waits for the GPU."""
    return _RecordedRounding(out, grid, has_zero_point, device)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for all recordings. There is only one, because libraries hold memory for every stream."""
    return torch.cuda.Stream(device)


def record_launches(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record everything that `run` launches on the current GPU, and return a function that launches it again.

    The replay uses the same memory. `run` is called twice here: libraries set themselves up in a first call, which
    cannot be recorded.
    """
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # another thread may fetch a block
        run()
    return graph.replay


def factor_inverse(hessian: torch.Tensor, damping: float) -> InverseFactor:
    """Prepare a Hessian for `round_gptq`.

    Args:
        hessian: [in, in] float32, the mean of x^T x over tokens. Inputs that are always zero may have a zero row.
        damping: damping · mean(diagonal) is added to the diagonal of H. If the Cholesky factorization fails, damping is
            raised tenfold, with a warning. After 6 failures only the diagonal is used: inputs are rounded to nearest.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    mean = hessian.diagonal()[order].mean().clamp_min(torch.finfo(hessian.dtype).tiny)
    backwards = order.flip(0)  # a lower triangular matrix read backwards is upper triangular
    for _ in range(_ATTEMPTS):
        # At the MLP's width a matrix is larger than the whole block, so there is only one besides the Hessian. Its
        # columns are contiguous, so that LAPACK works in place.
        factor = hessian[backwards.unsqueeze(1), backwards].mT
        factor.diagonal().add_(damping * mean)
        failed = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed and torch.isfinite(torch.stack(factor.aminmax())).all():
            _turn_(factor.mT)
            return InverseFactor(order, factor.div_(factor.diagonal().clone()), damping)
        damping = max(damping, 1e-4) * _DAMPING_STEP
        logger.warning("the Hessian is not positive definite; damping raised to %g of its mean diagonal", damping)
    return InverseFactor(order, torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), damping)


def _turn_(matrix: torch.Tensor) -> None:
    """Reverse the order of rows and of columns in place, without a second matrix of this size."""
    count = len(matrix)
    for start in range(0, (count + 1) // 2, _ROWS):
        stop = min(start + _ROWS, (count + 1) // 2)
        first, last = matrix[start:stop], matrix[count - stop : count - start]
        turned = first.flip(0, 1)
        first.copy_(last.flip(0, 1))
        last.copy_(turned)
