"""Memory of vLLM's cache with packed codes against a cache of states, and perplexity with both.

    W=artifacts/calibration/evaluation
    python -m benchmarks.serving.packed_cache artifacts/export --windows $W/*.safetensors --perplexity 4

Run it where vLLM is installed (`make serve-setup`; docs/serving.md). Each cache has an engine in a process of its own.
vLLM gets 1 GiB for its cache and says how many blocks it makes of it. `sequences` is how many texts of 2,048 positions
these blocks hold at once, the prefix counted.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.serving.parity import compute_perplexities, score_served, set_up_vllm
from benchmarks.workspace import ROOT
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.errors import run_main
from pipeline.text.windows import load_windows

_SPACE, _POSITIONS, _WINDOW = 2**30, 2048, 1024


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="an exported model")
    parser.add_argument("--windows", type=Path, nargs="*", default=[], help="files of held-out token windows")
    parser.add_argument("--text", type=Path, help="a text file, cut into windows of 1,024 tokens")
    parser.add_argument("--perplexity", type=whole(0), default=0, metavar="N", help="of N windows of each file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--measure", choices=("states", "codes"), help="one cache, in this process")
    arguments = parser.parse_args()
    if arguments.perplexity and not (arguments.windows or arguments.text):
        parser.error("--perplexity needs --windows or --text")
    if arguments.measure:
        texts = {}
        if arguments.perplexity:
            windows = {path.stem: load_windows(path).token_ids[: arguments.perplexity] for path in arguments.windows}
            texts = {name: rows.tolist() for name, rows in windows.items()}
            if arguments.text:
                texts[arguments.text.stem] = cut_text(arguments.folder, arguments.text, arguments.perplexity)
        print(json.dumps(measure(arguments.folder, arguments.dtype, texts, arguments.measure == "codes")))
        return
    parts = {}
    for name in ("states", "codes"):
        command = [sys.executable, "-m", "benchmarks.serving.packed_cache", *sys.argv[1:], "--measure", name]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        parts[name] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(parts, indent=2))


def cut_text(folder: Path, path: Path, count: int) -> list[list[int]]:
    """Return the first `count` windows of a text, as token ids of the exported tokenizer."""
    ids = AutoTokenizer.from_pretrained(folder)(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return [ids[start : start + _WINDOW] for start in range(0, count * _WINDOW, _WINDOW)]


def measure(folder: Path, dtype: str, texts: dict[str, list[list[int]]], packed: bool) -> dict[str, Any]:
    """Return MiB per 1,000 positions, sequences in 1 GiB, and the perplexity of texts of each name."""
    set_up_vllm()
    from vllm import LLM

    llm = LLM(
        str(folder),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=_POSITIONS,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        additional_config={"packed_cache": packed},
    )
    cache = llm.llm_engine.vllm_config.cache_config
    assert cache.kv_cache_memory_bytes == _SPACE
    positions = cache.num_gpu_blocks * cache.block_size
    values: dict[str, Any] = {
        "blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "mib_per_1000_positions": round(1000 * _SPACE / positions / 2**20, 2),
        "sequences": cache.num_gpu_blocks // -(-_POSITIONS // cache.block_size),
    }
    if texts:
        values["perplexity"] = compute_perplexities({name: score_served(llm, rows) for name, rows in texts.items()})
    return values


if __name__ == "__main__":
    run_main(main)
