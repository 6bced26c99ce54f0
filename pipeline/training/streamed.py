"""The blocks of a whole model under training: all of them in memory, or the weights of one at a time.

A streamed block keeps what is small and what is trained: norms, biases, quantizers, and the optimizer its state of
them. The weights of its linears are read when it runs and dropped when another one does. Forward, only hidden states in
front of each block are kept, in memory or in files; backward, blocks are read again in reverse order, and each is run
again for its gradients:

    forward    0  1  …  L-1           the next one is read while one computes (on a GPU)
    backward            L-1  …  1  0  the last one is still there, as is the first one for the batch that follows

What comes of it is, to the last bit, what comes of blocks that are all there.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pipeline.blocks.prefetch import TensorFetcher, Tensors
from pipeline.models.architectures import Architecture
from pipeline.runtime.streams import Offload
from pipeline.training.place import Keeping, run_differentiably

Function = Callable[..., Any]  # (index, hidden, *others) -> hidden states behind block `index`, and what else there is


class TrainedBlocks:
    """Blocks on a device, run with gradients, in order and backwards.

    Of a streamed one that does not run the linears' weights are on the meta device.
    """

    def __init__(
        self,
        architecture: Architecture,
        load: Callable[[int], Tensors],
        device: torch.device,
        keeping: Keeping,
        offload: Offload,
    ) -> None:
        """No blocks yet.

        Args:
            load: the tensors of a block as they are on disk, the linears' weights among them.
            offload: where a streamed model keeps hidden states.
        """
        self._blocks: list[nn.Module] = []
        self.keeping, self.offload = keeping, offload
        self._names = [f"{name}.weight" for name in architecture.linears]
        self._load, self._fetcher = load, TensorFetcher(self._load_weights, device)
        self._trained: list[list[nn.Parameter]] = []
        self._present: int | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> nn.Module:
        """As it is at the moment."""
        return self._blocks[index]

    def append(self, block: nn.Module, trained: Iterable[nn.Parameter] = ()) -> None:
        """Take over a whole block, of which the parameters `trained` get gradients."""
        self._blocks.append(block)
        self._trained.append(list(trained))
        if self.keeping.stream:
            self._drop_(len(self) - 1)

    def run(self, function: Function, index: int, hidden: torch.Tensor, *others: torch.Tensor | None) -> Any:
        """function(index, hidden, *others), which runs block `index`; gradients reach all tensors and the trained."""
        if not self.keeping.stream:
            return run_differentiably(self.keeping.recompute, function, index, hidden, *others)
        if torch.is_grad_enabled():
            return _RunStreamed.apply(self, function, index, hidden, *others, *self._trained[index])
        self.bring(index, (index + 1) % len(self))
        return function(index, hidden, *others)

    def bring(self, index: int, following: int | None = None) -> nn.Module:
        """Block `index`, all of it; that of `following` may be fetched meanwhile."""
        if self.keeping.stream and self._present != index:
            if self._present is not None:
                self._drop_(self._present)
            self._set_(index, self._fetcher.get(index, following))
            self._present = index
        return self._blocks[index]

    def _load_weights(self, index: int) -> Tensors:
        """In the dtypes the block has them in."""
        tensors, block = self._load(index), self._blocks[index]
        own = {name: block.get_submodule(name.removesuffix(".weight")).weight.dtype for name in self._names}
        return {name: tensors[name].to(dtype) for name, dtype in own.items()}

    def _drop_(self, index: int) -> None:
        state = self._blocks[index].state_dict()
        self._set_(index, {name: state[name].to("meta") for name in self._names})

    def _set_(self, index: int, tensors: Tensors) -> None:
        self._blocks[index].load_state_dict(tensors, strict=False, assign=True)


class _RunStreamed(torch.autograd.Function):
    """One block with its gradients; in between it is not there."""

    @staticmethod
    def forward(
        ctx: Any, blocks: TrainedBlocks, function: Function, index: int, hidden: torch.Tensor, *tensors: Any
    ) -> Any:
        """`tensors`: others that the function takes, and the block's trained parameters."""
        blocks.bring(index, index + 1 if index + 1 < len(blocks) else None)
        others = tensors[: len(tensors) - len(blocks._trained[index])]
        ctx.set_materialize_grads(False)
        ctx.blocks, ctx.function, ctx.index = blocks, function, index
        kept = blocks.offload.keep(f"in-front-of-{index:05d}", hidden)
        ctx.file = None if isinstance(kept, torch.Tensor) else kept
        ctx.save_for_backward(hidden if ctx.file is None else None, *others)
        ctx.device = hidden.device
        ctx.autocast = torch.is_autocast_enabled(hidden.device.type), torch.get_autocast_dtype(hidden.device.type)
        return function(index, hidden, *others)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        blocks, index = ctx.blocks, ctx.index
        blocks.bring(index, index - 1 if index else None)
        hidden, *others = ctx.saved_tensors
        hidden = ctx.file[:].to(ctx.device) if hidden is None else hidden
        needed = ctx.needs_input_grad[3:]
        given = [
            tensor if tensor is None else tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip((hidden, *others), needed, strict=False)
        ]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device.type, dtype, enabled=enabled):
            outputs = ctx.function(index, *given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = zip(outputs, upstream, strict=True)
        pairs = [(output, own) for output, own in pairs if output.requires_grad and own is not None]
        sources = [t for t, wanted in zip((*given, *blocks._trained[index]), needed, strict=True) if wanted]
        found = iter(())
        if pairs:
            ends, weights = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(ends, sources, weights, allow_unused=True))
        return None, None, None, *(next(found, None) if wanted else None for wanted in needed)
