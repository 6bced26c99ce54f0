"""The blocks of a whole model under training: all of them in memory, or the weights of one block at a time.

A streamed block keeps its small tensors (norms, biases, quantizers) and the trained ones in memory. The weights of its
linears are read when it runs and dropped when another block runs. The forward pass keeps only the hidden states before
each block, in memory or in files. The backward pass reads the blocks again in reverse order and runs each once more for
its gradients:

    forward    0  1  …  L-1           on a GPU, the next block is read while one computes
    backward            L-1  …  1  0  the last block is still in memory, and so is the first one for the next batch

The results are the same to the last bit as with blocks that stay in memory.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pipeline.blocks.prefetch import TensorFetcher, Tensors
from pipeline.models.architectures import Architecture
from pipeline.models.layers import DecoderLayer
from pipeline.runtime.streams import Offload
from pipeline.training.place import Keeping, run_differentiably

Function = Callable[..., Any]  # (index, hidden, *others) -> hidden states after block `index`, or a tuple of tensors


class TrainedBlocks:
    """The blocks of a model on a device, which run with gradients.

    The linears' weights of a streamed block that does not run are on the meta device.
    """

    def __init__(
        self,
        architecture: Architecture,
        load: Callable[[int], Tensors],
        device: torch.device,
        keeping: Keeping,
        offload: Offload,
    ) -> None:
        """Start without blocks.

        Args:
            load: returns the tensors of a block as they are on disk, among them the linears' weights.
            offload: holds the hidden states of a streamed model.
        """
        self._blocks: list[DecoderLayer] = []
        self.keeping, self.offload = keeping, offload
        self._architecture = architecture
        self._weight_names: list[list[str]] = []  # of each block
        self._load, self._fetcher = load, TensorFetcher(self._load_weights, device)
        self._trained: list[list[nn.Parameter]] = []
        self._present: int | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> DecoderLayer:
        """Return a block in its current state: the weights of a streamed one may be missing."""
        return self._blocks[index]

    def append(self, block: DecoderLayer, trained: Iterable[nn.Parameter] = ()) -> None:
        """Take over a complete block, whose parameters `trained` get gradients."""
        self._blocks.append(block)
        self._weight_names.append([f"{name}.weight" for name in self._architecture.of_block(block).linears])
        self._trained.append(list(trained))
        if self.keeping.stream:
            self._drop_(len(self) - 1)

    def run(self, function: Function, index: int, hidden: torch.Tensor, *others: torch.Tensor | None) -> Any:
        """Return function(index, hidden, *others), which runs block `index`.

        Gradients reach `hidden`, `others` and the block's trained parameters.
        """
        if not self.keeping.stream:
            return run_differentiably(self.keeping.recompute, function, index, hidden, *others)
        if torch.is_grad_enabled():
            return _RunStreamed.apply(self, function, index, hidden, *others, *self._trained[index])
        self.bring(index, (index + 1) % len(self))
        return function(index, hidden, *others)

    def bring(self, index: int, following: int | None = None) -> DecoderLayer:
        """Return block `index` with all its weights; on a GPU, block `following` is fetched meanwhile."""
        if self.keeping.stream and self._present != index:
            if self._present is not None:
                self._drop_(self._present)
            self._set_(index, self._fetcher.get(index, following))
            self._present = index
        return self._blocks[index]

    def _load_weights(self, index: int) -> Tensors:
        """Return the linears' weights of a block from disk, in the dtypes that the block has them in."""
        tensors, block = self._load(index), self._blocks[index]
        names = self._weight_names[index]
        loaded = {}
        for name in names:
            weight = block.get_submodule(name.removesuffix(".weight")).weight
            assert isinstance(weight, torch.Tensor), f"{name} belongs to a linear, plain or with quantizers"
            loaded[name] = tensors[name].to(weight.dtype)
        return loaded

    def _drop_(self, index: int) -> None:
        state = self._blocks[index].state_dict()
        self._set_(index, {name: state[name].to("meta") for name in self._weight_names[index]})

    def _set_(self, index: int, tensors: Tensors) -> None:
        self._blocks[index].load_state_dict(tensors, strict=False, assign=True)


class _RunStreamed(torch.autograd.Function):
    """Runs a streamed block with gradients; between the two passes its weights are not in memory."""

    @staticmethod
    def forward(
        ctx: Any, blocks: TrainedBlocks, function: Function, index: int, hidden: torch.Tensor, *tensors: Any
    ) -> Any:
        """Run the block; `tensors` are the other arguments of the function, then the block's trained parameters."""
        blocks.bring(index, index + 1 if index + 1 < len(blocks) else None)
        others = tensors[: len(tensors) - len(blocks._trained[index])]
        ctx.set_materialize_grads(False)
        ctx.blocks, ctx.function, ctx.index = blocks, function, index
        stream = blocks.offload.keep(f"before-{index:05d}", hidden)
        ctx.file = None if isinstance(stream, torch.Tensor) else stream
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
        # Whether hidden, the others and the trained parameters need a gradient; blocks, function and index never do.
        needed = ctx.needs_input_grad[3:]
        arguments = [
            tensor if tensor is None else tensor.detach().requires_grad_(is_needed)
            for tensor, is_needed in zip((hidden, *others), needed, strict=False)
        ]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device.type, dtype, enabled=enabled):
            outputs = ctx.function(index, *arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (output, slope)
            for output, slope in zip(outputs, upstream, strict=True)
            if output.requires_grad and slope is not None
        ]
        inputs = (*arguments, *blocks._trained[index])
        sources = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed and tensor is not None]
        gradients: Iterator[torch.Tensor | None] = iter(())
        if pairs:
            ends, slopes = zip(*pairs, strict=True)
            gradients = iter(torch.autograd.grad(ends, sources, slopes, allow_unused=True))
        return None, None, None, *(next(gradients, None) if is_needed else None for is_needed in needed)
