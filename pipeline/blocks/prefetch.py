"""Blocks one after another. On a GPU the next one is read, pinned and sent while the one before it computes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn

from pipeline.models.layers import DecoderLayer

Tensors = dict[str, torch.Tensor]


def prefetch_blocks(
    load: Callable[[int], DecoderLayer], indices: Iterable[int], device: torch.device
) -> Iterator[DecoderLayer]:
    """Yield the block of each index, on `device`. Drop it before asking for the next, or two are in memory.

    Args:
        load: returns a block by its index, on the CPU, with tensors of the dtypes they have on `device`.
        device: on a CPU a block is loaded when it is asked for. On a GPU a thread loads one block ahead into pinned
            memory, and a separate stream copies it.
    """
    if device.type != "cuda":
        for index in indices:
            yield load(index).to(device)
        return
    stream = torch.cuda.Stream(device)

    def fetch(index: int) -> tuple[DecoderLayer, torch.cuda.Event]:
        block = load(index)
        for tensor in _tensors(block):
            tensor.data = tensor.data.pin_memory()
        with torch.cuda.stream(stream):
            block.to(device, non_blocking=True)
            return block, _record(stream)

    with ThreadPoolExecutor(1) as pool:
        fetched = None
        for following in (*indices, None):
            ahead = None if following is None else pool.submit(fetch, following)
            if fetched is not None:
                block, sent = fetched.result()
                fetched = None
                _await(sent, _tensors(block), device)
                yield block
                del block
            fetched = ahead


class TensorFetcher:
    """Loads tensors by an index to `device`, in any order. On a GPU the next ones are fetched meanwhile.

    Args:
        load: returns names and tensors by an index, on the CPU.
        device: as in `prefetch_blocks`.
    """

    def __init__(self, load: Callable[[int], Tensors], device: torch.device) -> None:
        self._load, self._device = load, device
        self._ahead: tuple[int, Future] | None = None
        if device.type == "cuda":
            self._stream, self._pool = torch.cuda.Stream(device), ThreadPoolExecutor(1)

    def get(self, index: int, following: int | None) -> Tensors:
        """Return the tensors of `index`, and begin to fetch `following`, if there are any."""
        if self._device.type != "cuda":
            return {name: tensor.to(self._device) for name, tensor in self._load(index).items()}
        if self._ahead is None or self._ahead[0] != index:
            self._ahead = index, self._pool.submit(self._fetch, index)
        tensors, sent = self._ahead[1].result()
        self._ahead = None if following is None else (following, self._pool.submit(self._fetch, following))
        _await(sent, tensors.values(), self._device)
        return tensors

    def _fetch(self, index: int) -> tuple[Tensors, torch.cuda.Event]:
        pinned = {name: tensor.pin_memory() for name, tensor in self._load(index).items()}
        with torch.cuda.stream(self._stream):
            sent = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
            return sent, _record(self._stream)


def _tensors(block: nn.Module) -> list[torch.Tensor]:
    return [*block.parameters(), *block.buffers()]


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _await(sent: torch.cuda.Event, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Make all later computation wait for the copies, and keep their memory from being reused while it is read."""
    current = torch.cuda.current_stream(device)
    current.wait_event(sent)
    for tensor in tensors:
        tensor.record_stream(current)
