"""Time and memory of the exported model, against the original and in vLLM, in one table.

    python -m benchmarks.speed.inference                        # artifacts/model and artifacts/export of the last run
    python -m benchmarks.speed.inference --json inference.json --w4a16 FOLDER --lm-head-8 FOLDER
    python -m benchmarks.speed.inference --context 4096 --batches 8

Each row runs several times in processes of its own, with rows in turn. Times are medians over the rounds. Prefill is
one forward of a batch of texts of 512 tokens (`--context`), by default of one text and of eight. Decoding is the
median of the steps that make 64 tokens one by one after them. Peak memory includes loading and excludes the memory
after the imports; vLLM's includes its cache of 1 GiB. Perplexity is on the windows of
artifacts/calibration/evaluation/wikipedia.

Rows of vLLM run where it is installed (`make serve-setup`; docs/serving.md), in process, without its prefix caching.
`--w4a16` is a folder in compressed-tensors (docs/formats.md) for one of them, `--lm-head-8` an export with
`quantizer_init.lm_head_bits: 8` for another.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.serving.parity import as_prompts, compute_perplexity, score, score_served, set_up_vllm
from benchmarks.workspace import ROOT, append_row, make_parser, read_rows
from pipeline.inference.loading import load
from pipeline.pictures.tables import format_markdown
from pipeline.runtime.arguments import whole
from pipeline.runtime.errors import run_main
from pipeline.runtime.progress import current_rss_gib, peak_rss_gib, return_freed_memory
from pipeline.text.windows import load_windows


@dataclass(frozen=True)
class Row:
    """A model and how it runs.

    Attributes:
        arithmetic: argument of `load`; None: transformers' own loading.
        unpacked: argument of `load`.
        packed_cache: whether vLLM's cache holds codes (docs/serving.md#a-cache-of-codes).
    """

    engine: str
    folder: str
    dtype: str = "float32"
    arithmetic: str | None = None
    unpacked: bool = True
    packed_cache: bool = False


ROWS = {
    "original, float32": Row("transformers", "model"),
    "original, bfloat16": Row("transformers", "model", "bfloat16"),
    "export, float": Row("transformers", "export", arithmetic="float"),
    "export, float, packed": Row("transformers", "export", arithmetic="float", unpacked=False),
    "export, integer": Row("transformers", "export", arithmetic="integer"),
    "export, integer, bfloat16": Row("transformers", "export", "bfloat16", "integer"),
    "vLLM, original, bfloat16": Row("vllm", "model", "bfloat16"),
    "vLLM, W4A16, bfloat16": Row("vllm", "w4a16", "bfloat16"),
    "vLLM, export, bfloat16": Row("vllm", "export", "bfloat16"),
    "vLLM, export, lm_head in 8 bits, bfloat16": Row("vllm", "lm_head_8", "bfloat16"),
    "vLLM, export, float32": Row("vllm", "export"),
    "vLLM, export, cache of codes, bfloat16": Row("vllm", "export", "bfloat16", packed_cache=True),
}
# Folders of rows that are not in the artifacts -> the option that names each.
_OPTIONS = {"w4a16": "--w4a16", "lm_head_8": "--lm-head-8"}
ROUNDS, BATCHES = 3, (1, 8)
_PREFILL, _DECODED = 512, 64
_KINDS = ("prefill", "decode")


def main() -> None:
    has_vllm = importlib.util.find_spec("vllm") is not None
    default = [name for name, row in ROWS.items() if row.engine != "vllm" or (has_vllm and row.folder not in _OPTIONS)]
    parser = make_parser(__doc__, list(ROWS), default)
    parser.add_argument("--artifacts", type=Path, default=ROOT / "artifacts", help="of a finished run")
    parser.add_argument("--w4a16", type=Path, help="a folder in compressed-tensors: adds its row")
    parser.add_argument("--lm-head-8", type=Path, help="an export with lm_head in 8 bits: adds its row")
    parser.add_argument("--rounds", type=whole(1), default=ROUNDS)
    parser.add_argument("--batches", type=whole(1), nargs="+", default=list(BATCHES), help="texts in a batch")
    parser.add_argument("--context", type=whole(1), default=_PREFILL, help=f"tokens of a text (default: {_PREFILL})")
    parser.add_argument("--child", choices=list(ROWS), help=argparse.SUPPRESS)  # one row, in this process
    arguments = parser.parse_args()
    artifacts = arguments.artifacts.resolve()
    given = {key: path.resolve() for key in _OPTIONS if (path := getattr(arguments, key)) is not None}
    folders = {"model": artifacts / "model", "export": artifacts / "export", **given}
    if arguments.child:
        print(json.dumps(measure(ROWS[arguments.child], folders, artifacts, arguments.batches, arguments.context)))
        return
    names = arguments.rows + [name for name, row in ROWS.items() if row.folder in given and has_vllm]
    if missing := next((ROWS[name].folder for name in names if ROWS[name].folder not in folders), None):
        parser.error(f"--rows: a row needs {_OPTIONS[missing]} FOLDER")
    if not names:
        parser.error("--rows: name at least one")
    rows = read_rows(arguments.json)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS if name in names and name not in rows}
    for _ in range(arguments.rounds):
        for name, measured in rounds.items():
            command = [
                sys.executable,
                "-m",
                "benchmarks.speed.inference",
                "--child",
                name,
                "--artifacts",
                str(artifacts),
                "--batches",
                *map(str, arguments.batches),
                "--context",
                str(arguments.context),
            ]
            for key, path in given.items():
                command += [_OPTIONS[key], str(path)]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            measured.append(json.loads(done.stdout.splitlines()[-1]))
    for name, measured in rounds.items():
        values = {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        append_row(arguments.json, rows, name, values)
    print(format_table(rows, arguments.batches, arguments.context))


def measure(
    row: Row, folders: dict[str, Path], artifacts: Path, batches: Sequence[int], context: int
) -> dict[str, float]:
    """Return size and peak memory in GiB, seconds to load, to prefill and per decoded token, and perplexity."""
    windows = load_windows(artifacts / "calibration/evaluation/wikipedia.safetensors").token_ids
    return_freed_memory()
    before = current_rss_gib()
    folder = folders[row.folder]
    run = run_vllm if row.engine == "vllm" else run_transformers
    values = run(row, folder, windows, batches, context)
    values["memory"] = values.pop("peak") - before
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
    return values | {"size": size}


def run_transformers(
    row: Row, folder: Path, windows: torch.Tensor, batches: Sequence[int], context: int
) -> dict[str, float]:
    """Measure a row in transformers."""
    start = time.perf_counter()
    dtype = getattr(torch, row.dtype)
    if row.arithmetic is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    else:
        model, _ = load(folder, arithmetic=row.arithmetic, dtype=dtype, unpacked=row.unpacked)
    values = {"load": time.perf_counter() - start}
    for batch in batches:
        for kind, seconds in time_steps(model, cut_texts(windows, batch, context)).items():
            values[f"{kind} {batch}"] = seconds
    values["peak"] = peak_rss_gib()
    return values | {"perplexity": compute_perplexity([score(model, window) for window in windows.tolist()])}


@torch.no_grad()
def time_steps(model: PreTrainedModel, token_ids: torch.Tensor) -> dict[str, float]:
    """Return the seconds of a prefill [B, T] and of a step of B tokens after it, without the first of each."""
    prefill, decode = [], []
    for _ in range(3):
        start = time.perf_counter()
        cache = model(token_ids, use_cache=True, logits_to_keep=1).past_key_values
        prefill.append(time.perf_counter() - start)
    for step in range(_DECODED + 1):
        start = time.perf_counter()
        model(token_ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        decode.append(time.perf_counter() - start)
    return {"prefill": statistics.median(prefill[1:]), "decode": statistics.median(decode[1:])}


def run_vllm(row: Row, folder: Path, windows: torch.Tensor, batches: Sequence[int], context: int) -> dict[str, float]:
    """Measure a row in vLLM."""
    set_up_vllm()
    from vllm import LLM

    start = time.perf_counter()
    llm = LLM(
        str(folder),
        dtype=row.dtype,
        max_num_seqs=max(batches),
        max_num_batched_tokens=max(batches) * (min(context, _PREFILL) + 64),
        max_model_len=max(windows.shape[1], context + _DECODED) + 64,
        enable_prefix_caching=False,
        additional_config={"packed_cache": row.packed_cache},
    )
    values = {"load": time.perf_counter() - start}
    runs = max(1, 5 * _PREFILL // context)
    for batch in batches:
        texts = as_prompts(cut_texts(windows, batch, context).tolist())
        generate(llm, as_prompts(windows[:1, : min(context, _PREFILL)].tolist() * batch), 2)  # does not count
        timed = [generate(llm, texts, 1 + _DECODED) for _ in range(runs)]
        values[f"prefill {batch}"] = statistics.median(sum(prefill) for prefill, _ in timed)
        values[f"decode {batch}"] = statistics.median(statistics.median(decode) for _, decode in timed)
    values["peak"] = peak_rss_gib()
    return values | {"perplexity": compute_perplexity(score_served(llm, windows.tolist()))}


def generate(llm: Any, texts: list[dict[str, list[int]]], tokens: int) -> tuple[list[float], list[float]]:
    """Continue texts in vLLM.

    Returns:
        The seconds of the steps until all texts have a first token, and of the later steps in which all texts get one.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    prefill: list[float] = []
    decode: list[float] = []
    started: set[str] = set()
    for place, text in enumerate(texts):
        engine.add_request(str(place), text, sampling)
    while engine.has_unfinished_requests():
        are_started = len(started) == len(texts)
        start = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - start
        if not are_started:
            prefill.append(seconds)
        elif len(outputs) == len(texts):
            decode.append(seconds)
        started |= {output.request_id for output in outputs}
    return prefill, decode


def cut_texts(windows: torch.Tensor, batch: int, context: int = _PREFILL) -> torch.Tensor:
    """Return different texts, [batch, context]. Texts longer than a window go on in the next one."""
    if context > windows.shape[1]:
        tokens = windows.flatten().repeat(1 + context // windows.numel())
        return torch.stack([tokens.roll(-place * _PREFILL)[:context] for place in range(batch)])
    texts = windows.unfold(1, context, _PREFILL // 4).flatten(0, 1)
    return texts[:: len(texts) // batch][:batch]


def format_table(rows: dict[str, Any], batches: Sequence[int] = BATCHES, context: int = _PREFILL) -> str:
    """Return a Markdown table, with speeds as ratios to the first row's."""
    base = next(iter(rows.values()))
    times = [(kind, batch) for batch in batches for kind in _KINDS]
    head = ["", "file, MiB", "peak memory, GiB"]
    head += [f"{kind}, {'one text' if batch == 1 else f'{batch} texts'}" for kind, batch in times]
    lines = []
    for name, row in rows.items():
        speeds = [f"{base[f'{kind} {batch}'] / row[f'{kind} {batch}']:.2f}" for kind, batch in times]
        lines.append([name, f"{row['size'] * 1024:.0f}", f"{row['memory']:.2f}", *speeds, f"{row['perplexity']:.2f}"])
    speeds = [f"{batch * (context if kind == 'prefill' else 1) / base[f'{kind} {batch}']:.0f}" for kind, batch in times]
    table = format_markdown([*head, "perplexity"], lines)
    return f"{table}\n\n1.00 is {', '.join(speeds)} tokens per second."


if __name__ == "__main__":
    run_main(main)
