"""Speed and memory of exported ONNX folders in ONNX Runtime, as ratios to the first, and the operators that it runs.

    python -m benchmarks.quality.onnx --rows float/none/none W8A8/merged/found --keep exports
    python -m benchmarks.speed.onnx exports/float-none-none exports/W8A8-merged-found

Each folder runs several times in processes of its own, with folders in turn. Times are medians over the rounds. Prefill
is one call with a text of --tokens tokens. Decoding is 16 tokens one by one after it. Peak memory includes loading and
excludes the memory after the imports.

The operators are those of ONNX Runtime's own profile of the second call, after all its optimizations, with their share
of the time of all operators.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workspace import ROOT
from pipeline.interop.onnx_session import OnnxModel
from pipeline.pictures.tables import format_markdown
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.errors import run_main
from pipeline.runtime.progress import current_rss_gib, peak_rss_gib, return_freed_memory

# Products in ONNX Runtime: integers with an int32 sum | floats, from integer weights or not.
PRODUCTS = (
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulNBits",
    "MatMul",
    "FusedMatMul",
    "Gemm",
)
_DECODED = 16


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="ONNX folders; ratios are to the first")
    parser.add_argument("--rounds", type=whole(1), default=3)
    parser.add_argument("--tokens", type=whole(1), default=256, help="of the text")
    parser.add_argument("--threads", type=whole(1), default=2, help="of ONNX Runtime")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # one folder, in this process
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)  # of one folder, in this process
    options = parser.parse_args()
    if options.child or options.profile:
        measure = profile_operators if options.profile else measure_folder
        print(json.dumps(measure(options.folders[0], options.tokens, options.threads)))
        return
    rounds: dict[Path, list[dict[str, float]]] = {folder: [] for folder in options.folders}
    for _ in range(options.rounds):
        for folder, measured in rounds.items():
            measured.append(run_child(folder, "--child", options))
    profiles = {folder: run_child(folder, "--profile", options) for folder in options.folders}
    rows = {
        str(folder): {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        for folder, measured in rounds.items()
    }
    print(format_speeds(rows, options.tokens))
    print("\n" + format_products({str(folder): profile for folder, profile in profiles.items()}))


def run_child(folder: Path, task: str, options: argparse.Namespace) -> Any:
    """Return the values that this program prints in a process of its own."""
    sizes = ["--tokens", str(options.tokens), "--threads", str(options.threads)]
    command = [sys.executable, "-m", "benchmarks.speed.onnx", str(folder.resolve()), task, *sizes]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_folder(folder: Path, tokens: int, threads: int) -> dict[str, float]:
    """Return seconds to load, to prefill and per decoded token, peak memory in GiB and size in MiB."""
    return_freed_memory()
    before = current_rss_gib()
    start = time.perf_counter()
    model = OnnxModel(folder, threads)
    load = time.perf_counter() - start
    text, prefill, decode = make_text(tokens), [], []
    _, state = model.read(text)  # the first call allocates
    for _ in range(3):
        start = time.perf_counter()
        _, state = model.read(text)
        prefill.append(time.perf_counter() - start)
    for token in range(_DECODED):
        start = time.perf_counter()
        _, state = model.read(text[:, token : token + 1], state)
        decode.append(time.perf_counter() - start)
    return {
        "load": load,
        "prefill": statistics.median(prefill),
        "decode": statistics.median(decode),
        "memory": peak_rss_gib() - before,
        "size": sum(path.stat().st_size for path in folder.glob("model.onnx*")) / 2**20,
    }


def make_text(tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return a text of different tokens [1, T]."""
    return np.arange(tokens)[None] % 1000 + 100


def profile_operators(folder: Path, tokens: int, threads: int) -> dict[str, tuple[int, float]]:
    """Return operator -> how many nodes of it one call runs, and their share of the time of all nodes."""
    counts: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as work:
        model = OnnxModel(folder, threads, profile=Path(work) / "profile")
        for _ in range(2):
            model.read(make_text(tokens))
        events = json.loads(Path(model.session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    for event in runs[len(runs) // 2 :]:  # the first call allocates
        counts[event["args"]["op_name"]] += 1
        microseconds[event["args"]["op_name"]] += event["dur"]
    whole_time = sum(microseconds.values())
    return {name: (count, microseconds[name] / whole_time) for name, count in counts.items()}


def format_speeds(rows: dict[str, dict[str, float]], tokens: int) -> str:
    """Return a Markdown table, with speeds as ratios to the first row's, and the speed of the first."""
    base = next(iter(rows.values()))
    lines = [
        [
            name,
            f"{row['size']:.0f}",
            f"{row['memory']:.2f}",
            f"{row['load']:.1f}",
            *(f"{base[kind] / row[kind]:.2f}" for kind in ("prefill", "decode")),
        ]
        for name, row in rows.items()
    ]
    head = ["", "file, MiB", "peak memory, GiB", "load, s", "prefill", "decode"]
    speeds = f"{tokens / base['prefill']:.0f} and {1 / base['decode']:.0f}"
    return f"{format_markdown(head, lines)}\n\n1.00 is {speeds} tokens per second."


def format_products(profiles: dict[str, dict[str, tuple[int, float]]]) -> str:
    """Return a Markdown table: nodes and their share of the time, for each kind of product and all other operators."""
    names = [name for name in PRODUCTS if any(name in profile for profile in profiles.values())]
    lines = []
    for folder, profile in profiles.items():
        others = [values for name, values in profile.items() if name not in names]
        cells = [profile.get(name, (0, 0.0)) for name in names]
        cells.append((sum(count for count, _ in others), sum(share for _, share in others)))
        lines.append([folder, *(f"{count} ({share:.0%})" for count, share in cells)])
    return format_markdown(["", *names, "other operators"], lines)


if __name__ == "__main__":
    run_main(main)
