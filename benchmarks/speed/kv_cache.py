"""Memory and speed of the packed KV cache in transformers, against a cache of dequantized states.

    python -m benchmarks.speed.kv_cache artifacts/export --context 8000

Each cache generates a few tokens after a random context in a process of its own, whose peak memory is measured. Then
one process decodes with both caches, token by token in turn, and compares the medians. `predicted_mib` is the
arithmetic: codes, places and tables are stored in place of the states of all layers but one, which are dequantized for
the call.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.workspace import ROOT
from pipeline.blocks.packed_layers import has_codes
from pipeline.inference.loading import load
from pipeline.inference.prefixed_model import PrefixedModel
from pipeline.models.layers import list_layers
from pipeline.numerics.packing import packed_width
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.errors import run_main
from pipeline.runtime.progress import peak_rss_gib, return_freed_memory

STEPS = 24
PLACE_BYTES, TABLE_BYTES = 4, 4  # an int32 position per layer and token, float32 cosines and sines per channel


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="an exported model")
    parser.add_argument("--context", type=whole(1), default=8000, help="tokens before the decoded ones")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--arithmetic", choices=("integer", "float"), default="integer")
    parser.add_argument("--measure", choices=("packed", "unpacked", "speed"), help="one part, in this process")
    arguments = parser.parse_args()
    options = [str(arguments.folder), "--context", str(arguments.context)]
    options += ["--dtype", arguments.dtype, "--arithmetic", arguments.arithmetic]
    if arguments.measure is not None:
        model, _ = load(arguments.folder, arithmetic=arguments.arithmetic, dtype=getattr(torch, arguments.dtype))
        part = measure_speed if arguments.measure == "speed" else measure_memory
        print(json.dumps(part(model, arguments.context, arguments.measure == "packed")))
        return
    parts = {name: _run(name, options) for name in ("unpacked", "packed", "speed")}
    fall = parts["unpacked"]["peak_mib"] - parts["packed"]["peak_mib"]
    values = {
        "context": arguments.context,
        "peak_mib": {name: parts[name]["peak_mib"] for name in ("unpacked", "packed")},
    }
    print(json.dumps(values | {"fall_mib": fall, **parts["speed"]}, indent=2))


def _run(name: str, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed.kv_cache", *options, "--measure", name]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


@torch.no_grad()
def measure_memory(model: PrefixedModel, context: int, packed: bool) -> dict[str, float]:
    """Return the peak memory of a generation, in MiB."""
    return_freed_memory()
    cache = model.make_cache(packed=packed)
    model.generate(
        _draw_text(model, context), past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    return {"peak_mib": round(peak_rss_gib() * 1024, 1)}


@torch.no_grad()
def measure_speed(model: PrefixedModel, context: int, _: bool) -> dict[str, Any]:
    """Return the arithmetic of the cache's memory, and milliseconds per token with both caches."""
    text = _draw_text(model, context)
    caches = {name: model.make_cache(packed=name == "packed") for name in ("unpacked", "packed")}
    logits: dict[str, torch.Tensor] = {}
    for name, cache in caches.items():
        logits[name] = model(text, past_key_values=cache, logits_to_keep=1).logits
    times: dict[str, list[float]] = {name: [] for name in caches}
    distance = (logits["packed"] - logits["unpacked"]).abs().max().item()
    for _step in range(STEPS):
        token = logits["unpacked"][:, -1].argmax(-1, keepdim=True)
        for name, cache in caches.items():
            start = time.process_time()
            logits[name] = model(token, past_key_values=cache).logits
            times[name].append(time.process_time() - start)
        distance = max(distance, (logits["packed"] - logits["unpacked"]).abs().max().item())
    medians = {name: 1000 * statistics.median(values[2:]) for name, values in times.items()}
    return {
        "predicted_mib": predict_fall(model, context) / 2**20,
        "ms_per_token": {name: round(value, 2) for name, value in medians.items()},
        "packed_over_unpacked": round(medians["packed"] / medians["unpacked"], 3),
        "largest_difference_of_logits": distance,
    }


def predict_fall(model: PrefixedModel, context: int) -> float:
    """Return the bytes that a packed cache saves at `context` tokens, while one layer is dequantized."""
    saved, one, tables = 0, 0, 0
    for block in list_layers(model):
        attention = block.self_attn
        if not has_codes(attention):
            continue
        heads, width = model.config.num_key_value_heads, attention.head_dim
        full = 2 * heads * width * model.dtype.itemsize
        bits = (attention.key_quantizer.quantizer.spec.bits, attention.value_quantizer.spec.bits)
        saved += full - sum(heads * packed_width(width, number) for number in bits) - PLACE_BYTES
        one, tables = full, width * TABLE_BYTES
    return context * (saved - one - tables)


def _draw_text(model: PrefixedModel, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, model.config.vocab_size, (1, length), generator=generator)


if __name__ == "__main__":
    run_main(main)
