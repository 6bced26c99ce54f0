"""Static quantization in ONNX Runtime by bits, rotation and prefix: perplexity, integer products, speed, continuations.

    python -m benchmarks.quality.onnx --artifacts artifacts --json onnx.json
    python -m benchmarks.quality.onnx --rows float/none/none W8A8/none/none W8A8/none/found

A row is FORMAT/ROTATION/PREFIX. `float` has no quantizers. Activations have one static scale per tensor. Keys and
values are not quantized. ROTATION is none or merged (R1 and R2: nothing acts online). Ranges are searched in the values
themselves and weights are rounded to nearest, so that the table compares formats and not rounding.

Each row is quantized from a finished run in --artifacts, exported as `export.formats: [onnx]` does, and read by ONNX
Runtime on the CPU. `pipeline` is the perplexity of the same checkpoint in this project. The products are those of the
graph that ONNX Runtime runs after its own optimizations. Finished rows are kept in --json and skipped later.
"""

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
import torch

from benchmarks.quality.formats import PLAIN, Bench
from benchmarks.workspace import append_row, make_parser, read_rows
from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.evaluation.samples import PROMPTS
from pipeline.interop.onnx_session import OnnxModel, make_options
from pipeline.interop.other_formats import write_formats
from pipeline.pictures.tables import format_markdown
from pipeline.runtime.arguments import whole
from pipeline.runtime.artifacts import make_header
from pipeline.runtime.errors import run_main

FORMATS = {
    "float": PLAIN | {"weights.bits": 16, "activations.bits": 16},
    "W8A8": PLAIN | {"weights.bits": 8, "activations.bits": 8, "activations.symmetric": False},
    "W4A8": PLAIN
    | {"weights.bits": 4, "weights.group_size": 64, "activations.bits": 8, "activations.symmetric": False},
    "W8A16": PLAIN
    | {"weights.bits": 8, "activations.format": "int16", "activations.bits": 16, "activations.symmetric": False},
}
ROWS = [
    "float/none/none",
    *(
        f"{name}/{rotation}/{use}"
        for name in ("W8A8", "W4A8")
        for rotation in ("none", "merged")
        for use in ("none", "found")
    ),
    "W8A16/merged/found",
]
PRODUCTS = ("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "MatMulNBits", "MatMul", "FusedMatMul")
CHOSEN_PROMPTS = PROMPTS[:3]


def main() -> None:
    parser = make_parser(__doc__, ROWS)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="of a finished run")
    parser.add_argument("--windows", type=whole(1), default=8, help="of each corpus, at most")
    parser.add_argument("--calibration", type=whole(1), default=16, help="windows, at most")
    parser.add_argument("--length", type=whole(2), default=1024, help="tokens of a window that are read, at most")
    parser.add_argument("--threads", type=whole(1), default=2, help="of ONNX Runtime")
    options = parser.parse_args()
    rows = read_rows(options.json)
    bench = Bench(options.artifacts, options.work / "onnx", options.windows, options.calibration, options.length)
    for row in options.rows:
        if row not in rows:
            append_row(options.json, rows, row, measure(bench, row, options.threads))
    shutil.rmtree(bench.work, ignore_errors=True)
    print_tables({row: rows[row] for row in ROWS if row in rows})


def measure(bench: Bench, row: str, threads: int) -> dict[str, Any]:
    """Quantize, export and measure one row."""
    name, rotation, use = row.split("/")
    quantized, start_token = bench.quantize(rotation, 32, use, FORMATS[name], searches_weights=name == "W4A8")
    evaluated = bench.evaluate(quantized, start_token)["perplexity"]
    folder = bench.work / "export"
    write_formats(
        quantized,
        load_prefix_kv(quantized.folder, quantized.stage),
        folder,
        formats=["onnx"],
        drop=[],
        max_shard_size="5GB",
        header=make_header("export", {}),
        text_start_token_id=start_token,
    )
    before = psutil.Process().memory_info().rss
    model = OnnxModel(folder / "onnx", threads)
    perplexity = {
        corpus: measure_perplexity(model, windows, start_token) for corpus, windows in bench.load_held_out().items()
    }
    values = {
        "perplexity": perplexity,
        "pipeline": evaluated,
        "nodes": count_products(folder / "onnx" / "model.onnx", bench.work / "optimized.onnx"),
        "file_mib": sum(path.stat().st_size for path in (folder / "onnx").glob("model.onnx*")) / 2**20,
        "speed": measure_speed(model),
        "rss_mib": (psutil.Process().memory_info().rss - before) / 2**20,
        "samples": [continue_text(model, quantized.tokenizer, prompt, start_token) for prompt in CHOSEN_PROMPTS],
    }
    shutil.rmtree(quantized.folder.parent)
    return values


def measure_perplexity(model: OnnxModel, windows: torch.Tensor, start_token: int | None) -> float:
    """Return the perplexity of windows [N, T], each read in one call; the first token is not predicted."""
    losses = []
    for window in windows.tolist():
        start = [] if start_token is None else [start_token]
        logits, _ = model.read([start + window])
        log_p = torch.from_numpy(logits[0, len(start) : -1]).double().log_softmax(-1)
        losses.append(-log_p.gather(1, torch.tensor(window[1:])[:, None]).mean())
    return float(torch.stack(losses).mean().exp())


def count_products(graph: Path, optimized: Path) -> dict[str, int]:
    """Return how many products of each kind ONNX Runtime's own optimizations leave in a graph."""
    options = make_options()
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(optimized, load_external_data=False).graph.node
    counts = Counter(node.op_type for node in nodes)
    return {name: counts[name] for name in PRODUCTS if counts[name]}


def measure_speed(model: OnnxModel) -> dict[str, float]:
    """Return tokens per second of reading 256 tokens in one call, and of 16 single tokens after them."""
    tokens = np.arange(256)[None] % 1000 + 100
    model.read(tokens)
    start = time.perf_counter()
    _, state = model.read(tokens)
    read = time.perf_counter()
    for token in range(16):
        _, state = model.read([[100 + token]], state)
    return {"read": 256 / (read - start), "generate": 16 / (time.perf_counter() - read)}


def continue_text(model: OnnxModel, tokenizer: Any, prompt: str, start_token: int | None) -> str:
    """Return a prompt with the 20 most likely tokens after it."""
    token_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = [] if start_token is None else [start_token]
    return prompt + tokenizer.decode(model.generate(start + token_ids, 20))


def print_tables(rows: dict[str, Any]) -> None:
    """Print a table of perplexities, one of products, speed and size, and the continuations."""
    if not rows:
        return
    corpora = list(next(iter(rows.values()))["perplexity"])
    lines = [
        [
            *row.split("/"),
            *(f"{values[kind][corpus]:.2f}" for corpus in corpora for kind in ("perplexity", "pipeline")),
        ]
        for row, values in rows.items()
    ]
    titles = [title for corpus in corpora for title in (corpus, "in the pipeline")]
    print(format_markdown(["format", "rotation", "prefix", *titles], lines, titles=3))
    lines = [
        [
            row,
            ", ".join(f"{count} {name}" for name, count in values["nodes"].items()),
            *(f"{values['speed'][kind]:.0f}" for kind in ("read", "generate")),
            *(f"{values[kind]:.0f}" for kind in ("file_mib", "rss_mib")),
        ]
        for row, values in rows.items()
    ]
    head = ["row", "products", "tokens/s read", "generated", "file MiB", "RSS MiB"]
    print("\n" + format_markdown(head, lines, titles=2))
    for row, values in rows.items():
        print(f"\n{row}\n" + "\n".join(f"    {sample!r}" for sample in values["samples"]))


if __name__ == "__main__":
    run_main(main)
