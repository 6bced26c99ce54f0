"""What fine-tuning takes: of a whole model what all blocks leave for the backward pass, or the blocks alone, or one."""

from dataclasses import replace

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need, Share, fits, make_need
from pipeline.planning.sizes import Sizes
from pipeline.runtime.memory import memory_limit
from pipeline.runtime.params import RuntimeParams
from pipeline.training.params import FinetuningParams


def plan_finetuning(
    checkpoint: Checkpoint, share: Share, whole: Share, params: FinetuningParams, runtime: RuntimeParams
) -> Need:
    """What fine-tuning takes.

    Args:
        checkpoint: the rotated model.
        share: windows to train blocks on and validation windows together.
        whole: those to train all blocks on, together with validation windows.
    """
    sizes = Sizes.of(checkpoint)
    kept = {"fp_input": 2, "quant_input": 2, "both": 3}[params.blocks.target]
    streams = sizes.stream(share.tokens) * kept
    if params.end_to_end.enabled:  # what goes in, and what should come out
        streams = max(streams, sizes.stream(whole.tokens) * 2)
    trained = params.blocks.weight_lr > 0 or params.start == "full_precision"
    # Integers; float weights, their gradients, two moments, best state, and what rounding leaves.
    state = sizes.numbers * (1 + (4 * 6 if trained else 4))
    training = state + sizes.graph(params.blocks.batch_size * share.length)
    forward = sizes.numbers * 5 + sizes.forward(runtime.batch_size * share.length)
    phases = [training if params.blocks.enabled else 0, forward, sizes.table]
    model = sizes.blocks * sizes.numbers
    disk = model * (2 if params.end_to_end.enabled else 1) + 2 * sizes.stream(share.tokens)
    limit = memory_limit(runtime)
    # A block on its way to a file, trained weights also as their best state; tables of both models end to end.
    passing = sizes.tables_passing
    if params.blocks.enabled:
        passing = sizes.numbers * (8.8 if trained else 5) + sizes.table
    if params.end_to_end.enabled:
        passing = max(passing, 3.2 * sizes.table)
    narrow = share.on_gpu and params.autocast != "none" and sizes.item < 4  # what autograd keeps is in bfloat16

    def put_together(recompute: bool, stream: bool = False) -> Need:
        whole_model, states = 0.0, 0.0
        if params.end_to_end.enabled:
            batch = params.end_to_end.batch_size * whole.length
            states = sizes.blocks * batch * sizes.hidden * (sizes.item if stream else 4)
            heads = 2 * sizes.table + 5 * sizes.logits
            graph = sizes.graph(batch) * (0.64 if narrow else 1) if recompute else sizes.kept_graphs(batch)
            # Beside integers: scales and the optimizer's state of them, and what a block's integers stand for.
            weights, ahead = model * 1.05 + sizes.numbers * 4 * 3, sizes.ahead
            if stream:  # integers are what is fetched
                weights, ahead = model * 0.01 + sizes.numbers * (1 + sizes.item * 2), min(sizes.ahead, sizes.numbers)
            whole_model = weights + states + graph + heads + (ahead if share.on_gpu else 0)
        place = {"on_gpu": share.on_gpu, "ahead": sizes.ahead, "passing": passing}
        need = make_need(max(phases), streams, disk=disk, alone=whole_model, **place)
        if runtime.offload == "never" or (runtime.offload == "auto" and need.memory <= limit):
            return replace(need, recompute=recompute, stream=stream)
        if stream:  # what is between blocks goes into files too
            need = make_need(max(phases), streams, disk=disk + states, alone=whole_model - states, **place)
        # Saving maps the files once, one stream at a time.
        in_memory = need.memory - streams * (1 - 1 / (2 * kept))
        on_disk = need.disk + streams
        return Need(in_memory, need.gpu, on_disk, streams, offload=True, recompute=recompute, stream=stream)

    need = put_together(recompute=False)
    if not params.end_to_end.enabled:
        return need
    # Who always asks for files wants memory for something else.
    if fits(need, runtime, share.on_gpu) and runtime.offload != "always":
        return need
    need = put_together(recompute=True)
    return need if fits(need, runtime, share.on_gpu) else put_together(recompute=True, stream=True)
