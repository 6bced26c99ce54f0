"""The part of a layer that one of several processes computes (tensor parallelism), as vLLM splits it.

    q, k, v, gate, up   split by output channels: each process has some of the heads and of the hidden channels
    o_proj, down_proj   split by input channels; vLLM adds the outputs of all processes

Online rotations (R4, R5) and ranges that are measured on a token need all channels of an input. The input of o_proj and
down_proj is therefore gathered from all processes, and rotated and quantized as in a single one. Each process then
multiplies its own columns. Codes and partial transforms would move as many values: the transform of a gathered half is
not known before the other half has arrived.

Results equal one process up to the order in which the processes' outputs are added.
"""

from collections.abc import Sequence

import torch
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear

from pipeline.blocks.kv_cache import KeyQuantizer
from pipeline.numerics.quantizer import ActivationQuantizer
from pipeline.serving.linear import WHOLE, LayerPart


def find_part(fused: LinearBase, widths: Sequence[int]) -> LayerPart:
    """Return the part of a layer of vLLM that this process computes.

    Args:
        widths: output channels of each exported linear in the layer.
    """
    if fused.tp_size == 1:
        return WHOLE
    if isinstance(fused, RowParallelLinear):
        width = fused.input_size // fused.tp_size
        columns, first = _locate(width, fused.tp_rank), fused.tp_rank == 0
        return LayerPart(columns=columns, adds_bias=first, gather=tensor_model_parallel_all_gather)
    places: list[slice]
    if isinstance(fused, QKVParallelLinear):
        places = [_locate(fused.num_heads, fused.tp_rank, fused.head_size)]
        places += [_locate(fused.num_kv_heads, find_kv_rank(fused), fused.head_size)] * 2
    else:
        places = [_locate(width // fused.tp_size, fused.tp_rank) for width in widths]
    rows, start = [], 0
    for width, place in zip(widths, places, strict=True):
        rows.append(torch.arange(start + place.start, start + place.stop))
        start += width
    return LayerPart(rows=torch.cat(rows))


def count_outputs(fused: LinearBase) -> int:
    """Return how many parts of an output the processes have, each of the same width."""
    return 1 if isinstance(fused, RowParallelLinear) else fused.tp_size


def find_kv_rank(fused: QKVParallelLinear) -> int:
    """Return which part of the KV heads this process has: with fewer heads than processes, several have the same."""
    return fused.tp_rank // fused.num_kv_head_replicas


def find_kv_heads(fused: LinearBase) -> slice:
    """Return the KV heads of this process."""
    if fused.tp_size == 1 or not isinstance(fused, QKVParallelLinear):
        return slice(None)
    return _locate(fused.num_kv_heads, find_kv_rank(fused))


def _locate(count: int, rank: int, width: int = 1) -> slice:
    return slice(rank * count * width, (rank + 1) * count * width)


def select_heads_(quantizer: KeyQuantizer | ActivationQuantizer, heads: slice) -> None:
    """Leave only some heads in a quantizer of keys or values. All of its buffers begin with the dimension of heads."""
    for module in quantizer.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer[heads].clone())
    if isinstance(quantizer, KeyQuantizer):
        quantizer.heads = len(range(quantizer.heads)[heads])
