"""Perplexity, size, time and memory of this project and of other tools, in one table.

    python -m benchmarks.peers --json peers.json
    python -m benchmarks.peers --json peers.json --text wikitext2.txt --rows torchao:w4a16 prefixquant:w4a16
    python -m benchmarks.peers --json peers.json --rows          # the table of the rows that are finished

Every tool gets an environment of its own from PyPI, of about 1.5 GB, and one process for each row. All rows quantize
the packaged model. Tools that calibrate read the windows of `calibration.train`, and tools that train also those of
`calibration.end_to_end`. Perplexity is measured on the evaluation windows of the packaged corpora and on the first
windows of each --text, by the same function. Seconds are those of one CPU thread. Finished rows are kept in --json and
skipped later.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks.peers.measure import CALIBRATION, TRAINING
from benchmarks.workspace import ROOT, Workspace, append_row, read_params, read_rows
from pipeline.pictures.tables import format_markdown
from pipeline.runtime.arguments import Parser, whole
from pipeline.text.calibration import cut_documents
from pipeline.text.corpora import read_local_documents
from pipeline.text.windows import load_windows

TORCH = "torch==2.13.0"
# Tool -> its name in PyPI, and all packages of its environment. This project is installed from the repository.
PACKAGES = {
    "prefixquant": ["prefixquant-pipeline"],
    "llm-compressor": ["llmcompressor", TORCH],
    "auto-round": ["auto-round", TORCH],
    "torchao": ["torchao", TORCH, "transformers"],
}
LENGTH = 1024  # tokens in a window of --text, as in calibration.evaluation


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        tool: a key of PACKAGES.
        method: a method of the tool's script.
        bits: the group of the row.
        title: the row's name.
    """

    tool: str
    method: str
    bits: str
    title: str

    @property
    def name(self) -> str:
        """Return the name of the row on the command line."""
        return f"{self.tool}:{self.method}"


ROWS = [
    Row("prefixquant", "original", "16 bits", "original"),
    Row("prefixquant", "w4a16", "W4A16, groups of 64", "this project: GPTQ"),
    Row("llm-compressor", "w4a16", "W4A16, groups of 64", "llm-compressor: GPTQ"),
    Row("auto-round", "w4a16", "W4A16, groups of 64", "auto-round, trained"),
    Row("torchao", "w4a16", "W4A16, groups of 64", "torchao: HQQ"),
    Row("torchao", "w8a8-dynamic", "W8A8, dynamic", "torchao"),
    Row("torchao", "w4a8-dynamic", "W4A8, dynamic, groups of 64", "torchao: HQQ"),
    Row("prefixquant", "w4a4-dynamic", "W4A4, dynamic, groups of 64", "this project: prefix, GPTQ"),
    Row("llm-compressor", "w4a4-dynamic", "W4A4, dynamic, groups of 64", "llm-compressor: SpinQuant, GPTQ"),
    Row("auto-round", "w4a4-dynamic", "W4A4, dynamic", "auto-round, trained"),
    Row("auto-round", "mxfp4", "MXFP4", "auto-round, trained"),
    Row("prefixquant", "w4a4kv4-no-prefix", "W4A4KV4, static", "this project, no prefix"),
    Row("prefixquant", "w4a4kv4-no-prefix-trained", "W4A4KV4, static", "this project, no prefix, trained"),
    Row("prefixquant", "w4a4kv4", "W4A4KV4, static", "this project: prefix"),
    Row("prefixquant", "w4a4kv4-trained", "W4A4KV4, static", "this project: prefix, trained"),
]


def main() -> None:
    """Run `python -m benchmarks.peers`."""
    names = [row.name for row in ROWS]
    parser = Parser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--rows", nargs="*", choices=names, default=names, metavar="TOOL:METHOD", help=", ".join(names))
    parser.add_argument("--text", type=Path, action="append", default=[], help="further text to measure on")
    parser.add_argument("--windows", type=whole(1), default=8, help="windows of each --text; default: 8")
    parser.add_argument("--json", type=Path, help="keep finished rows in this file")
    parser.add_argument("--work", type=Path, default=Path(".work/peers"), help="where environments and models go")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    rows = read_rows(arguments.json)
    chosen = [row for row in ROWS if row.name in arguments.rows and row.name not in rows]
    if chosen:
        model, inputs = prepare_inputs(work, arguments.text, arguments.windows)
        for row in chosen:
            append_row(arguments.json, rows, row.name, run_row(row, work=work, model=model, inputs=inputs))
    print(format_table(rows))


def prepare_inputs(work: Path, texts: Sequence[Path], windows: int) -> tuple[Path, Path]:
    """Return the folder of the packaged model, and a file with the windows of every row."""
    folder = Workspace(work / "stages").run("calibration", read_params())
    calibration = folder / "artifacts/calibration"
    model = folder / "artifacts/model"
    train = load_windows(calibration / "train.safetensors").token_ids
    tensors = {
        CALIBRATION: train,
        TRAINING: torch.cat([train, load_windows(calibration / "end_to_end.safetensors").token_ids]),
    }
    for path in sorted((calibration / "evaluation").glob("*.safetensors"), reverse=True):
        tensors[path.stem] = load_windows(path).token_ids
    tokenizer = AutoTokenizer.from_pretrained(model)
    for path in texts:
        documents = read_local_documents(path, "text")
        tensors[path.stem] = cut_documents(documents, windows, LENGTH, tokenizer, str(path))
    inputs = work / "inputs.safetensors"
    save_file({name: ids.contiguous() for name, ids in tensors.items()}, inputs)
    return model, inputs


def run_row(row: Row, *, work: Path, model: Path, inputs: Path) -> dict[str, Any]:
    """Quantize and measure one row in the environment of its tool, and return what its script wrote.

    Raises:
        subprocess.CalledProcessError: the tool failed. Its output has been shown.
    """
    python = make_environment(row.tool, work)
    out, result = work / f"{row.tool}-{row.method}", work / f"{row.tool}-{row.method}.json"
    if row.tool != "prefixquant":  # which replaces the folder itself
        shutil.rmtree(out, ignore_errors=True)
    script = Path(__file__).with_name(f"quantize_with_{row.tool.replace('-', '_').replace('llm_', 'llm')}.py")
    packages = [package.partition("==")[0] for package in PACKAGES[row.tool]]
    arguments = [row.method, "--model", model, "--inputs", inputs, "--out", out, "--row", result, "--packages"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    subprocess.run([python, script, *arguments, *packages], cwd=work, env=environment, check=True)
    return json.loads(result.read_text(encoding="utf-8"))


def make_environment(tool: str, work: Path) -> Path:
    """Return the Python of a tool's environment, which is made at the first call."""
    folder = work / f"environment-{tool}"
    python, installed = folder / "bin/python", folder / ".installed"
    if not installed.is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        if tool == "prefixquant":
            subprocess.run([*pip, "-c", ROOT / "constraints.txt", f"{ROOT}[quantize]"], check=True)
            subprocess.run([*pip, "--no-deps", "-r", ROOT / "requirements-packaged.txt"], check=True)
        else:
            subprocess.run([*pip, *PACKAGES[tool]], check=True)
        installed.touch()
    return python


def format_table(rows: dict[str, Any]) -> str:
    """Return a Markdown table of finished rows, grouped by bits, with a ratio to the row of the original model."""
    finished = [row for row in ROWS if row.name in rows]
    if not finished:
        return "No row is finished."
    original = rows.get("prefixquant:original", {}).get("perplexity", {})
    texts = list(rows[finished[0].name]["perplexity"])
    lines = []
    for row in finished:
        values = rows[row.name]
        cells = []
        for text in texts:
            perplexity, base = values["perplexity"].get(text), original.get(text)
            cells.append("" if perplexity is None else f"{perplexity:.2f}")
            cells.append("" if perplexity is None or base is None else f"{perplexity / base:.2f}")
        cost = [f"{values['seconds']}", f"{values['gib']:.1f}"] if values["seconds"] else ["", ""]
        lines.append([row.bits, row.title, *cells, f"{values['mib']:.0f}", *cost])
    head = ["bits", "", *(title for text in texts for title in (text, "ratio")), "MiB", "seconds", "GiB"]
    return "\n".join([format_markdown(head, lines, titles=2), "", *describe_settings(rows, finished)])


def describe_settings(rows: dict[str, Any], finished: Sequence[Row]) -> list[str]:
    """Return a line for every row with its settings, and one with the versions of each tool."""
    lines = [f"- {row.bits}, {row.title}: {rows[row.name]['settings']}" for row in finished]
    versions = {row.tool: rows[row.name]["versions"] for row in finished}
    for tool, packages in versions.items():
        lines.append(f"- {tool}: " + ", ".join(f"{name} {version}" for name, version in packages.items()))
    return lines
