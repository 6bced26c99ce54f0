"""What the exported model takes to load and run, against the original, in one table.

    python -m benchmarks.inference                        # artifacts/model and artifacts/export of the last run
    python -m benchmarks.inference --json inference.json

Each row runs in a process of its own, several times, rows in turn; times are medians over the rounds. Prefill is one
forward of 512 tokens, decoding 32 tokens one by one behind them. Peak memory is the process's, loading included, less
what it had after its imports. Perplexity is on the windows of artifacts/calibration/evaluation/.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.workspace import ROOT, append_row, make_parser, read_rows
from pipeline.export.loading import load
from pipeline.runtime.errors import run_main
from pipeline.runtime.progress import current_rss_gib, peak_rss_gib, return_freed_memory
from pipeline.text.windows import load_windows

ROWS = ("original, float32", "original, bfloat16", "export, float", "export, integer")
ROUNDS = 3
_PREFILL, _DECODED = 512, 32


def main() -> None:
    parser = make_parser(__doc__, ROWS)
    parser.add_argument("--artifacts", type=Path, default=ROOT / "artifacts", help="of a finished run")
    parser.add_argument("--child", choices=ROWS, help="measure one row in this process, and print it")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.artifacts)))
        return
    rows = read_rows(arguments.json)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.rows if name not in rows}
    for _ in range(ROUNDS):
        for name, own in rounds.items():
            command = [sys.executable, "-m", "benchmarks.inference", "--child", name]
            command += ["--artifacts", str(arguments.artifacts.resolve())]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            own.append(json.loads(done.stdout.splitlines()[-1]))
    for name, own in rounds.items():
        values = {key: statistics.median(measured[key] for measured in own) for key in own[0]}
        append_row(arguments.json, rows, name, values)
    print(format_table(rows))


def measure(name: str, artifacts: Path) -> dict[str, float]:
    """File size and peak memory in GiB, seconds to load, to prefill and per decoded token, perplexity."""
    windows = load_windows(artifacts / "calibration/evaluation/wikipedia.safetensors").token_ids
    return_freed_memory()
    before = current_rss_gib()
    start = time.perf_counter()
    folder = artifacts / ("export" if name.startswith("export") else "model")
    if name.startswith("export"):
        model, _ = load(folder, arithmetic=name.rpartition(" ")[2])
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name.rpartition(" ")[2])).eval()
    loaded = time.perf_counter() - start
    prefill, decode = time_steps(model, windows[:1, :_PREFILL])
    values = {"load": loaded, "prefill": prefill, "decode": decode, "memory": peak_rss_gib() - before}
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
    return values | {"size": size, "perplexity": measure_perplexity(model, windows)}


@torch.no_grad()
def time_steps(model: PreTrainedModel, token_ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of a prefill [1, T] and of a token behind it, the first of each left out."""
    seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(3):
        start = time.perf_counter()
        cache = model(token_ids, use_cache=True, logits_to_keep=1).past_key_values
        seconds["prefill"].append(time.perf_counter() - start)
    for step in range(_DECODED + 1):
        start = time.perf_counter()
        model(token_ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        seconds["decode"].append(time.perf_counter() - start)
    return statistics.median(seconds["prefill"][1:]), statistics.median(seconds["decode"][1:])


@torch.no_grad()
def measure_perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    losses = []
    for window in windows:
        log_p = model(window[None]).logits[0, :-1].float().log_softmax(-1)
        losses.append(-log_p.gather(1, window[1:, None]).mean())
    return torch.stack(losses).mean().exp().item()


def format_table(rows: dict[str, Any]) -> str:
    """A Markdown table; speeds as ratios to the original in float32."""
    base = rows.get(ROWS[0])
    lines = ["| | file, MiB | peak memory, GiB | prefill speed | decode speed | perplexity, wikipedia |"]
    lines.append("| --- |" + " ---: |" * 5)
    for name, row in rows.items():
        speeds = [f"{base[key] / row[key]:.2f}" if base else "" for key in ("prefill", "decode")]
        cells = [f"{row['size'] * 1024:.0f}", f"{row['memory']:.2f}", *speeds, f"{row['perplexity']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if base:
        lines += ["", f"1.00 is {_PREFILL / base['prefill']:.0f} tokens a second, and {1 / base['decode']:.1f}."]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
