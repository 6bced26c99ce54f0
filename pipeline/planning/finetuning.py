"""Memory and disk of `finetuning`: one block under training, then (end to end) all of them.

End to end, there are three ways, from the fastest to the one that needs least memory:

    1. All blocks, and the values that autograd keeps of each.
    2. All blocks, and hidden states between them. Blocks run again for the backward pass.
    3. One block at a time (streamed), and hidden states between blocks, which may be in files.

All ways give the same results, so a plan takes the first one that fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.constants import (
    AUTOCAST_GRAPH,
    BLOCK_BYTES_THROUGH_HOST,
    END_TO_END_TABLES_THROUGH_HOST,
    KL_LOGITS,
    STREAMED_MODEL_BYTES,
    TRAINED_BLOCK_BYTES_THROUGH_HOST,
    TRAINED_MODEL_BYTES,
)
from pipeline.planning.disk import BlockFiles, count_quantized_blocks, count_rounded_tables, measure_companions
from pipeline.planning.need import Need, fits, make_need
from pipeline.planning.sizes import Sizes
from pipeline.planning.workload import Workload
from pipeline.quantization.params import QuantizerInitParams
from pipeline.runtime.memory import memory_limit
from pipeline.runtime.params import RuntimeParams
from pipeline.training.divergence import LOGIT_POSITIONS
from pipeline.training.params import FinetuningParams
from pipeline.training.place import Keeping
from pipeline.training.reference import PART_BYTES

# theta, its gradient, two moments and the best state, in float32; the lower neighbours of soft rounding, in int16.
_TRAINED_INTEGER_BYTES = 5 * 4 + 2
_WAYS = (Keeping(recompute=False), Keeping(recompute=True), Keeping(recompute=True, stream=True))


def plan_finetuning(
    rotated: Checkpoint,
    *,
    blocks: Workload,
    end_to_end: Workload,
    params: FinetuningParams,
    quantizer_init: QuantizerInitParams,
    runtime: RuntimeParams,
) -> Need:
    """Plan fine-tuning in the fastest way that fits.

    Args:
        rotated: the rotated model.
        blocks: windows to train single blocks on, and validation windows.
        end_to_end: windows to train all blocks on, and validation windows.
        quantizer_init: params that the quantized model was made with.
    """
    sizes = Sizes.of(rotated)
    tables = count_rounded_tables(sizes, quantizer_init)
    plan = _Plan(
        sizes=sizes,
        block_files=count_quantized_blocks(rotated, quantizer_init),
        other_files=tables + measure_companions(rotated),
        blocks=blocks,
        end_to_end=end_to_end,
        params=params,
        runtime=runtime,
    )
    ways: Sequence[Keeping] = _WAYS
    if not params.end_to_end.enabled:
        ways = _WAYS[:1]  # they differ end to end only
    elif params.end_to_end.weights != "fixed":
        ways = _WAYS[1:2] if runtime.offload == "always" else _WAYS[:2]  # weights under training are not streamed
    elif runtime.offload == "always":
        ways = _WAYS[1:]  # this setting asks for little memory
    for way in ways[:-1]:
        need = plan.count(way)
        if fits(need, runtime, blocks.on_gpu):
            return need
    return plan.count(ways[-1])


@dataclass(frozen=True)
class _Plan:
    """A run of fine-tuning.

    Attributes:
        block_files, other_files: bytes of the artifact.
        blocks, end_to_end: text of the two phases.
    """

    sizes: Sizes
    block_files: BlockFiles
    other_files: int
    blocks: Workload
    end_to_end: Workload
    params: FinetuningParams
    runtime: RuntimeParams

    def count(self, way: Keeping) -> Need:
        """Plan a run that trains all blocks in this way."""
        need = self._count_in_memory(way)
        offload = self.runtime.offload
        if offload == "never" or (offload == "auto" and need.memory <= memory_limit(self.runtime)):
            return need
        if way.stream:  # hidden states between blocks go into files, too
            need = self._count_in_memory(way, between_blocks_in_files=True)
        # Saving unfinished work maps the files into memory, one stream after the other.
        mapped = need.hidden_states / (2 * self._count_streams())
        hidden_states_of_all = need.hidden_states * self.blocks.processes
        return replace(
            need,
            memory=need.memory - need.hidden_states + mapped,
            work_files=need.work_files + hidden_states_of_all,
            offload=True,
        )

    def _count_in_memory(self, way: Keeping, between_blocks_in_files: bool = False) -> Need:
        """Plan a run with the hidden states of its windows in memory."""
        whole_model = between_blocks = 0.0
        if self.params.end_to_end.enabled:
            between_blocks = self._count_between_blocks(way)
            whole_model = self._count_whole_model(way) + (0.0 if between_blocks_in_files else between_blocks)
        work_files = self._count_unfinished()
        if between_blocks_in_files:
            work_files += self.blocks.processes * between_blocks
        need = make_need(
            on_gpu=self.blocks.on_gpu,
            compute=self._count_single_block(),
            compute_alone=whole_model,
            next_block=self.sizes.next_block,
            hidden_states=self._count_hidden_states(),
            through_host=self._count_through_host(),
            artifact=self.block_files.total + self.other_files,
            work_files=work_files,
        )
        return replace(need, recompute=way.recompute, stream=way.stream)

    @property
    def _weights_are_trained(self) -> bool:
        return self.params.blocks.weight_lr > 0 or self.params.start == "full_precision"

    def _count_streams(self) -> int:
        """Return how many hidden states of each window there are: the quantized model's, and one per target."""
        return {"fp_input": 2, "quant_input": 2, "both": 3}[self.params.blocks.target]

    def _count_hidden_states(self) -> int:
        block_by_block = self.sizes.hidden_states(self.blocks.tokens) * self._count_streams()
        if not self.params.end_to_end.enabled:
            return block_by_block
        # End to end: the part of the original's final hidden states that is computed at a time.
        return max(block_by_block, min(self.sizes.hidden_states(self.end_to_end.tokens), PART_BYTES))

    def _count_single_block(self) -> float:
        """Return the largest phase in which one block is in memory."""
        sizes = self.sizes
        # Integers. Then float32: the weights, or six times that where they are trained (weights, gradients, two
        # moments, the best state, and temporaries of rounding).
        state = sizes.weights * (1 + (4 * 6 if self._weights_are_trained else 4))
        training = state + sizes.graph(self.params.blocks.batch_size * self.blocks.length)
        forward = sizes.weights * 5 + sizes.forward(self.runtime.batch_size * self.blocks.length)
        return max(training if self.params.blocks.enabled else 0, forward, sizes.table)

    def _count_whole_model(self, way: Keeping) -> float:
        """Return the bytes that training end to end holds, without hidden states between blocks."""
        sizes, on_gpu = self.sizes, self.end_to_end.on_gpu
        batch = self.params.end_to_end.batch_size * self.end_to_end.length
        heads = 2 * sizes.table + KL_LOGITS * sizes.logits(LOGIT_POSITIONS)
        if way.recompute:
            narrow = on_gpu and self.params.autocast != "none" and sizes.itemsize < 4
            graph = sizes.graph(batch) * (AUTOCAST_GRAPH if narrow else 1)
        else:
            graph = sizes.kept_graphs(batch)
        model = sizes.blocks * sizes.weights
        if way.stream:  # only integers are fetched ahead
            weights = model * STREAMED_MODEL_BYTES + sizes.weights * (1 + sizes.itemsize * 2)
            next_block = min(sizes.next_block, sizes.weights)
        else:  # all integers, and a block's dequantized weights with temporaries
            weights = model * TRAINED_MODEL_BYTES + sizes.weights * 4 * 3
            next_block = sizes.next_block
        if self.params.end_to_end.weights != "fixed":
            weights += model * _TRAINED_INTEGER_BYTES
        return weights + graph + heads + (next_block if on_gpu else 0)

    def _count_between_blocks(self, way: Keeping) -> float:
        """Return the bytes of a batch's hidden states before every block."""
        batch = self.params.end_to_end.batch_size * self.end_to_end.length
        return self.sizes.blocks * batch * self.sizes.hidden * (self.sizes.itemsize if way.stream else 4)

    def _count_through_host(self) -> float:
        """Return the largest thing that passes through a GPU's host: a block to a file, or embeddings."""
        sizes, through_host = self.sizes, self.sizes.tables_through_host
        if self.params.blocks.enabled:
            per_weight = TRAINED_BLOCK_BYTES_THROUGH_HOST if self._weights_are_trained else BLOCK_BYTES_THROUGH_HOST
            through_host = sizes.weights * per_weight + sizes.table
        if self.params.end_to_end.enabled:
            through_host = max(through_host, END_TO_END_TABLES_THROUGH_HOST * sizes.table)
        return through_host

    def _count_unfinished(self) -> float:
        """Return the bytes of files from which a killed run continues, of all processes.

        Finished blocks become part of the artifact by hard links. End to end writes them a second time.
        """
        saved_streams = 1 if self.params.blocks.target == "quant_input" else 2
        generations = 2 if self.blocks.processes == 1 else 3
        hidden_states = generations * saved_streams * self.sizes.hidden_states(self.blocks.all_tokens)
        if not self.params.end_to_end.enabled:
            return hidden_states
        state = 2 * 4 * self.block_files.quantizers  # now, best, two moments; the new file and the old one
        is_cached = self.params.end_to_end.reference == "cached"
        if self.params.end_to_end.weights != "fixed":
            state += 2 * 16 * self.sizes.blocks * self.sizes.weights
        reference = self.sizes.hidden_states(self.end_to_end.all_tokens) if is_cached else 0.0
        return hidden_states + self.block_files.total + state + reference
