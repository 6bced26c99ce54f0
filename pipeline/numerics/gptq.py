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

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
    rounding = _Rounding(weight, factor, scale, zero_point, as_grid(grid, zero_point is None))
    rounding.round_(0, weight.shape[1])
    result = torch.empty_like(rounding.codes)
    result[factor.order] = rounding.codes
    return result.T.contiguous()


class _Rounding:
    """Of one weight. Inputs are rows, in the factor's order, so that what is taken one by one lies together in memory.

    Attributes:
        moved: [in, out] what inputs in front add to each; of those that are done, what rounding changed.
        codes: [in, out].
    """

    def __init__(
        self,
        weight: torch.Tensor,
        factor: InverseFactor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        grid: Grid,
    ) -> None:
        self.weight, self.factor, self.grid = weight, factor, grid
        out, width = weight.shape
        self.steps, self.offsets = (None if t is None else t.T.contiguous() for t in (scale, zero_point))
        self.groups = factor.order * scale.shape[1] // width
        self.moved = torch.zeros(width, out, device=weight.device)
        self.codes = torch.empty(self.moved.shape, dtype=grid.code_dtype, device=weight.device)
        self.replayed = _find_replayed(out, grid, zero_point is not None, weight.device) if weight.is_cuda else None

    def round_(self, start: int, stop: int) -> None:
        """Round inputs start to stop; all in front are done, and `moved` has what they add."""
        upper, moved, rows = self.factor.upper, self.moved, slice(start, stop)
        if stop - start > _INPUTS:
            half = (stop - start) // 2
            if self.replayed is not None:  # as many as were recorded
                half = _INPUTS * math.ceil(half / _INPUTS)
            middle = start + half
            self.round_(start, middle)
            moved[middle:stop].addmm_(upper[start:middle, middle:stop].T, moved[start:middle], alpha=-1)
            self.round_(middle, stop)
            return
        own = self.weight.index_select(1, self.factor.order[rows]).T.contiguous()  # plain indexing: 5 times as long
        step, offset = (None if t is None else _take(t, self.groups[rows]) for t in (self.steps, self.offsets))
        round_inputs_ = self.replayed or _round_inputs_
        round_inputs_(_Inputs(own, moved[rows], upper[rows, rows], step, offset), self.grid)
        self.codes[rows] = self.grid.encode(own)


def _take(parameters: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Of parameters [G, out], those of some inputs' groups, [n, out]."""
    if len(parameters) == 1:
        return parameters.expand(len(groups), -1)
    return parameters.index_select(0, groups)


class _Inputs(NamedTuple):
    """n inputs that are rounded one by one.

    Attributes:
        own: [n, out] weights; become values of the grid.
        moved: [n, out] what inputs in front add to them; becomes what rounding changed.
        upper: [n, n] of the factor.
        step, offset: [n, out].
    """

    own: torch.Tensor
    moved: torch.Tensor
    upper: torch.Tensor
    step: torch.Tensor
    offset: torch.Tensor | None


def _round_inputs_(inputs: _Inputs, grid: Grid) -> None:
    own, moved, upper, step, offset = inputs
    for row in range(len(own)):
        moved[row].addmv_(moved[:row].T, upper[:row, row], alpha=-1)
        zero_point = None if offset is None else offset[row]
        rounded = quantize(own[row] + moved[row], step[row], grid, zero_point)
        torch.sub(dequantize(rounded.clone(), step[row], zero_point), own[row], out=moved[row])
        own[row] = rounded


class _Replayed:
    """`_round_inputs_` as a CUDA graph: launched one by one, its small operations take 5 to 9 times as long."""

    def __init__(self, out: int, grid: Grid, has_offset: bool, device: torch.device) -> None:
        own, moved, step = (torch.zeros(_INPUTS, out, device=device) for _ in range(3))
        upper = torch.zeros(_INPUTS, _INPUTS, device=device)
        self.held = _Inputs(own, moved, upper, step.fill_(1), torch.zeros_like(own) if has_offset else None)
        self.replay = record_launches(lambda: _round_inputs_(self.held, grid), device)

    def __call__(self, inputs: _Inputs, grid: Grid) -> None:
        """As `_round_inputs_`, of at most as many inputs: those that are missing come last and touch nothing else."""
        count = len(inputs.own)
        for held, given in zip(self.held, inputs, strict=True):
            if given is not None:
                held[:count, : given.shape[1]] = given
        self.replay()
        inputs.own.copy_(self.held.own[:count])
        inputs.moved.copy_(self.held.moved[:count])


@functools.lru_cache(maxsize=16)
def _find_replayed(out: int, grid: Grid, has_offset: bool, device: torch.device) -> _Replayed:
    """Recorded once for all weights of a shape: recording waits for the GPU."""
    return _Replayed(out, grid, has_offset, device)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all that is recorded: libraries keep memory for every stream they have seen."""
    return torch.cuda.Stream(device)


def record_launches(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What launches again all that `run`, called twice here, launches on the current GPU, on the same memory."""
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # libraries set themselves up in a first call, which cannot be recorded
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # another thread may fetch a block
        run()
    return graph.replay


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
