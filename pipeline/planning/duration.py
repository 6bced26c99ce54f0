"""Seconds that each stage will take, from one measured forward pass of one block.

    seconds = passes x tokens x seconds of a token in a plain forward of the whole model

`measure_token` runs a block of the model's shapes with random weights for about a second. The passes of a stage are
fitted constants (`constants.py`), so a plan of time is right within a factor of two, where a plan of memory is within
20 %. Stages that only copy files are left out.
"""

import time
from dataclasses import dataclass

import torch

from pipeline.blocks.walk import BlockRunner
from pipeline.models.architectures import find_max_positions
from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.constants import (
    EVALUATION_PASSES,
    GPTQ_TOKENS,
    PICTURE_PASSES,
    QUANTIZED_EVALUATION_PASSES,
    QUANTIZER_INIT_PASSES,
    ROTATION_TOKENS,
    SEARCH_PASSES,
    TASK_ITEM_TOKENS,
    TRAINING_PASSES,
)
from pipeline.planning.sizes import Sizes

_FEW_TOKENS, _MANY_TOKENS = 32, 512
_FEWEST_RUNS, _ENOUGH_SECONDS = 3, 1.0


@dataclass(frozen=True)
class StageTokens:
    """Numbers of tokens that the stages read.

    Attributes:
        search, train, end_to_end, validation, evaluation, pictures: tokens of all windows.
        block_epochs, end_to_end_epochs: passes of training; 0: this phase is off.
        benefit: whether the search simulates quantizers.
        task_items: items of all tasks with a limit.
    """

    search: int
    train: int
    end_to_end: int
    validation: int
    evaluation: int
    pictures: int
    block_epochs: int
    end_to_end_epochs: int
    benefit: bool
    task_items: int


@torch.no_grad()
def measure_token(checkpoint: Checkpoint, device: torch.device) -> float:
    """Return the seconds that a token takes in a forward pass of the whole model in full precision, logits included.

    Block 0 is timed, and stands for all. The time of the logits is counted in proportion to their products.
    """
    sizes = Sizes.of(checkpoint)
    block = checkpoint.build_block(0).to_empty(device=device)
    for parameter in block.parameters():
        parameter.uniform_(-0.02, 0.02)
    runner = BlockRunner(checkpoint, device, batch_size=1)

    def run(tokens: int) -> float:
        hidden = torch.randn(1, tokens, sizes.hidden, device=device).to(checkpoint.dtype)
        start = time.perf_counter()
        runner.run(block, hidden)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    longest = find_max_positions(checkpoint.config)
    few_tokens, many_tokens = min(_FEW_TOKENS, longest), min(_MANY_TOKENS, longest)
    few = min(run(few_tokens) for _ in range(_FEWEST_RUNS))  # kernels are chosen in the first one
    tokens = many_tokens if few * many_tokens / few_tokens < _ENOUGH_SECONDS else few_tokens
    times = [run(tokens) for _ in range(_FEWEST_RUNS)]
    while sum(times) < _ENOUGH_SECONDS:
        times.append(run(tokens))
    block_seconds = min(times) / tokens  # other programs only make it longer
    products = sizes.hidden * (3 * sizes.inner + 2 * sizes.queries + 2 * sizes.keys)
    return block_seconds * (sizes.blocks + sizes.table_entries / products)


def plan_seconds(sizes: Sizes, tokens: StageTokens, token_seconds: float) -> dict[str, float]:
    """Return stage -> the seconds that it will take, all variants of `evaluation` and `activation_plots` together."""
    search = SEARCH_PASSES if tokens.benefit else EVALUATION_PASSES
    training = TRAINING_PASSES * (
        tokens.block_epochs * tokens.train
        + tokens.end_to_end_epochs * tokens.end_to_end
        + max(tokens.block_epochs, tokens.end_to_end_epochs) * tokens.validation / 2
    )
    # Two variants in full precision, three quantized ones.
    passes = 2 * EVALUATION_PASSES + 3 * QUANTIZED_EVALUATION_PASSES
    token_counts = {
        "rotation": ROTATION_TOKENS * sizes.hidden,
        "prefix_search": search * tokens.search,
        "quantizer_init": QUANTIZER_INIT_PASSES * tokens.train + GPTQ_TOKENS * sizes.hidden**0.5,
        "finetuning": training,
        "evaluation": passes * (tokens.evaluation + TASK_ITEM_TOKENS * tokens.task_items),
        "activation_plots": 4 * PICTURE_PASSES * tokens.pictures,
    }
    return {stage: count * token_seconds for stage, count in token_counts.items()}
