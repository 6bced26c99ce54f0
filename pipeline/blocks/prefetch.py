"""Blocks one after another; on a GPU the next one is read, pinned and sent while the one before it computes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn


def prefetch_blocks(
    load: Callable[[int], nn.Module], indices: Iterable[int], device: torch.device
) -> Iterator[nn.Module]:
    """The block of each index, on `device`. Drop it before asking for the next, or two are in memory.

    Args:
        load: a block by its index, on the CPU, its tensors as they are to be on `device`.
        device: on a CPU a block is loaded when it is asked for. On a GPU a thread loads one ahead into pinned memory,
            and a stream of its own copies it.
    """
    if device.type != "cuda":
        for index in indices:
            yield load(index).to(device)
        return
    stream = torch.cuda.Stream(device)

    def fetch(index: int) -> tuple[nn.Module, torch.cuda.Event]:
        block = load(index)
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.data = tensor.data.pin_memory()
        with torch.cuda.stream(stream):
            block.to(device, non_blocking=True)
            sent = torch.cuda.Event()
            sent.record(stream)
        return block, sent

    with ThreadPoolExecutor(1) as pool:
        fetched = None
        for following in (*indices, None):
            ahead = None if following is None else pool.submit(fetch, following)
            if fetched is not None:
                block, sent = fetched.result()
                fetched = None
                current = torch.cuda.current_stream(device)
                current.wait_event(sent)
                for tensor in (*block.parameters(), *block.buffers()):
                    tensor.record_stream(current)  # its memory is not reused for a copy while we compute on it
                yield block
                del block
            fetched = ahead
