"""Time of attention over packed codes against vLLM's attention over states in bfloat16, in one layer.

    python -m benchmarks.serving.code_attention

Run it where vLLM is installed (`make serve-setup`; docs/serving.md). Both have the shapes of the packaged model: 9
query heads, 3 KV heads of 64 channels, a mean of keys and a prefix. Both run on one thread, in turn, with pages of 128
positions. Figures are medians of CPU time in milliseconds. Other jobs on the machine disturb it less than time on the
clock.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.serving.parity import set_up_vllm
from pipeline.kernels.code_attention import CodeAttention, CodeFormat, make_table, make_turn
from pipeline.kernels.compiler import find_kernels
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.errors import run_main

HEADS, KV_HEADS, WIDTH, PREFIX, PAGE, BITS = 9, 3, 64, 4, 128, 4


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--context", type=whole(1), default=4096, help="positions of a text (default: 4096)")
    parser.add_argument("--rounds", type=whole(1), default=20)
    arguments = parser.parse_args()
    if not find_kernels():
        parser.error("attention over codes needs a C++ compiler")
    torch.set_num_threads(1)
    print(json.dumps(measure(arguments.context, arguments.rounds), indent=2))


def measure(context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of a decoding step of one text and of eight, and of a prefill's last 512 tokens."""
    values = {}
    for name, texts, tokens in (("decode, one text", 1, 1), ("decode, 8 texts", 8, 1), ("prefill", 1, 512)):
        calls = {
            "vllm": attend_states(texts, min(tokens, context), context),
            "codes": attend_codes(texts, min(tokens, context), context),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in calls}
        for _ in range(rounds + 1):
            for kind, call in calls.items():
                start = time.process_time()
                call()
                seconds[kind].append(time.process_time() - start)
        medians = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
        values[name] = {kind: round(1000 * value, 3) for kind, value in medians.items()}
        values[name]["codes / vllm"] = round(medians["codes"] / medians["vllm"], 2)
    return values


def make_batch(texts: int, tokens: int, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries [texts * tokens, heads, d], starts, lengths and pages of texts, as attention takes them."""
    queries = torch.randn(texts * tokens, HEADS, WIDTH).bfloat16()
    starts = torch.arange(0, texts * tokens + 1, tokens, dtype=torch.int32)
    pages = torch.arange(texts * -(-context // PAGE), dtype=torch.int32).view(texts, -1)
    return queries, starts, torch.full((texts,), context, dtype=torch.int32), pages


def attend_codes(texts: int, tokens: int, context: int) -> Callable[[], None]:
    """Return a call of this project's attention, over random codes."""
    queries, starts, lengths, pages = make_batch(texts, tokens, context)
    keys, values = (CodeFormat(BITS, torch.rand(KV_HEADS, WIDTH) + 0.5, torch.randn(KV_HEADS, WIDTH)) for _ in range(2))
    angles = torch.arange(context)[:, None] * 1e4 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    attention = CodeAttention(
        keys,
        values,
        scale=WIDTH**-0.5,
        turn=make_turn(WIDTH),
        mean=torch.randn(KV_HEADS, WIDTH),
        table=make_table(torch.cat((angles.cos(), angles.sin()), dim=-1)),
        prefix=torch.randn(2, KV_HEADS, PREFIX, WIDTH),
    )
    cache = torch.randint(0, 256, (pages.numel(), KV_HEADS, PAGE, keys.bytes + values.bytes), dtype=torch.uint8)
    output = torch.empty_like(queries)
    return lambda: attention.attend_(
        output,
        queries,
        key_codes=cache[..., : keys.bytes],
        value_codes=cache[..., keys.bytes :],
        pages=pages,
        starts=starts,
        lengths=lengths,
    )


def attend_states(texts: int, tokens: int, context: int) -> Callable[[], None]:
    """Return a call of vLLM's attention, over random states. It plans the work once, as vLLM does once per step."""
    set_up_vllm()
    from vllm import _custom_ops as operators
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    queries, starts, lengths, pages = make_batch(texts, tokens, context)
    instructions = _get_attn_isa(torch.bfloat16, PAGE, WIDTH)
    plan = operators.cpu_attn_get_scheduler_metadata(
        num_reqs=texts,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=WIDTH,
        seq_lens=lengths,
        dtype=torch.bfloat16,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=instructions,
        enable_kv_split=True,
    )
    cache = torch.randn(pages.numel(), KV_HEADS, 2 * PAGE, WIDTH).bfloat16()
    keys, values = cache.chunk(2, dim=2)
    output = torch.empty_like(queries)
    return lambda: operators.cpu_attention_with_kv_cache(
        query=queries,
        key_cache=keys,
        value_cache=values,
        output=output,
        query_start_loc=starts,
        seq_lens=lengths,
        scale=WIDTH**-0.5,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=pages,
        softcap=0.0,
        scheduler_metadata=plan,
        s_aux=None,
    )


if __name__ == "__main__":
    run_main(main)
