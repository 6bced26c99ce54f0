"""Static quantization in ONNX Runtime by bits, rotation and prefix: perplexity and continuations.

    python -m benchmarks.quality.onnx --artifacts artifacts --json onnx.json
    python -m benchmarks.quality.onnx --rows float/none/none W8A8/none/none W8A8/none/found --keep exports

A row is FORMAT/ROTATION/PREFIX. `float` has no quantizers. Activations have one static scale per tensor, weights one
scale per output channel. Keys and values are not quantized. ROTATION is none or merged (R1 and R2: nothing acts
online). Ranges are searched in the values themselves and weights are rounded to nearest, so that the table compares
formats and not rounding.

Each row is quantized from a finished run in --artifacts, exported as `export.formats: [onnx]` does, and read by ONNX
Runtime on the CPU. Rows with the same activations share one trace and differ in its tensors. `pipeline` is the
perplexity of the same checkpoint in this project. Finished rows are kept in --json and skipped later. --keep keeps the
folders, whose speed `benchmarks.speed.onnx` compares, and the checkpoint in each, for `benchmarks.quality.onnx_parity`.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from benchmarks.quality.formats import PLAIN, Bench
from benchmarks.workspace import append_row, make_parser, read_rows
from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.evaluation.samples import PROMPTS
from pipeline.export.params import OnnxParams
from pipeline.interop.onnx_folder import write_onnx
from pipeline.interop.onnx_graph import build_graph, fill_graph_
from pipeline.interop.onnx_session import OnnxModel
from pipeline.models.checkpoint import Checkpoint
from pipeline.pictures.tables import format_markdown
from pipeline.runtime.arguments import whole
from pipeline.runtime.artifacts import make_header
from pipeline.runtime.errors import run_main

_EIGHT = PLAIN | {"activations.bits": 8, "activations.symmetric": False}
FORMATS = {
    "float": PLAIN | {"weights.bits": 16, "activations.bits": 16},
    "W8A8": _EIGHT | {"weights.bits": 8},
    "W4A8": _EIGHT | {"weights.bits": 4},
    "W8A16": _EIGHT | {"weights.bits": 8, "activations.format": "int16", "activations.bits": 16},
}
ROWS = [
    "float/none/none",
    *(
        f"{name}/{rotation}/{use}"
        for name in ("W8A8", "W4A8", "W8A16")
        for rotation in ("none", "merged")
        for use in ("none", "found")
    ),
]
CHOSEN_PROMPTS = PROMPTS[:3]
NEW_TOKENS = 20
CHECKPOINT = "checkpoint"  # in the folder of a row: the quantized model that it was exported from


def main() -> None:
    parser = make_parser(__doc__, ROWS)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="of a finished run")
    parser.add_argument("--windows", type=whole(1), default=4, help="of each corpus, at most")
    parser.add_argument("--calibration", type=whole(1), default=16, help="windows, at most")
    parser.add_argument("--length", type=whole(2), default=512, help="tokens of a window that are read, at most")
    parser.add_argument("--threads", type=whole(1), default=2, help="of ONNX Runtime")
    parser.add_argument("--keep", type=Path, help="keep the folder of each row in this one")
    options = parser.parse_args()
    rows = read_rows(options.json)
    bench = Bench(options.artifacts, options.work / "onnx", options.windows, options.calibration, options.length)
    exporter = Exporter()
    for row in options.rows:
        if row not in rows:
            folder = bench.work / "export" if options.keep is None else options.keep / row.replace("/", "-")
            append_row(options.json, rows, row, measure(bench, exporter, row, folder, options.threads))
            if options.keep is None:
                shutil.rmtree(folder)
    shutil.rmtree(bench.work, ignore_errors=True)
    print_tables({row: rows[row] for row in ROWS if row in rows})


@dataclass
class Exporter:
    """Writes ONNX folders, and traces a model once for each format of activations: tracing takes minutes."""

    traces: dict[str, ir.Model] = field(default_factory=dict)

    def write(self, name: str, quantized: Checkpoint, folder: Path, start_token: int | None) -> None:
        """Write the folder of a checkpoint in the format `name`."""
        key = name.removeprefix("W4").removeprefix("W8")  # the bits of weights may differ
        if key not in self.traces:
            self.traces[key] = build_graph(quantized, optimize=False)
        graph = self.traces[key]
        fill_graph_(graph, quantized)
        folder.mkdir(parents=True, exist_ok=True)
        write_onnx(
            quantized,
            load_prefix_kv(quantized.folder, quantized.stage),
            folder,
            params=OnnxParams(),
            header=make_header("export", {}),
            text_start_token_id=start_token,
            graph=graph,
        )


def measure(bench: Bench, exporter: Exporter, row: str, folder: Path, threads: int) -> dict[str, Any]:
    """Quantize and export one row into `folder`, with its checkpoint, and measure it."""
    name, rotation, use = row.split("/")
    quantized, start_token = bench.quantize(rotation, 32, use, FORMATS[name], searches_weights=name == "W4A8")
    evaluated = bench.evaluate(quantized, start_token)["perplexity"]
    shutil.rmtree(folder, ignore_errors=True)
    exporter.write(name, quantized, folder, start_token)
    model = OnnxModel(folder, threads)
    perplexity = {
        corpus: measure_losses(model, windows, start_token).mean().exp().item()
        for corpus, windows in bench.load_held_out().items()
    }
    samples = [continue_text(model, quantized.tokenizer, prompt, start_token) for prompt in CHOSEN_PROMPTS]
    shutil.move(quantized.folder, folder / CHECKPOINT)
    shutil.rmtree(quantized.folder.parent)
    return {"perplexity": perplexity, "pipeline": evaluated, "samples": samples}


def measure_losses(model: OnnxModel, windows: torch.Tensor, start_token: int | None) -> torch.Tensor:
    """Return the mean loss of each window [N, T] in nats, float64 [N]; the first token is not predicted."""
    losses = []
    start = start_token_list(start_token)
    for window in windows.tolist():
        logits, _ = model.read([start + window])  # one call for the whole window
        losses.append(measure_loss(torch.from_numpy(logits[0, len(start) :]), torch.tensor(window)))
    return torch.stack(losses)


def measure_loss(logits: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of a window [T] in nats, float64, from its logits [T, V]."""
    log_p = logits[:-1].double().log_softmax(-1)
    return -log_p.gather(1, window[1:, None]).mean()


def continue_text(model: OnnxModel, tokenizer: Any, prompt: str, start_token: int | None) -> str:
    """Return the most likely tokens after a prompt."""
    token_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(model.generate(start_token_list(start_token) + token_ids, NEW_TOKENS))


def start_token_list(start_token: int | None) -> list[int]:
    """Return the start token as the beginning of a text, which may be empty."""
    return [] if start_token is None else [start_token]


def print_tables(rows: dict[str, Any], prompts: Sequence[str] = CHOSEN_PROMPTS) -> None:
    """Print a table of perplexities, and one of continuations."""
    if not rows:
        return
    corpora = list(next(iter(rows.values()))["perplexity"])
    lines = [
        [
            *row.split("/"),
            *(f"{values[kind][corpus]:,.2f}" for corpus in corpora for kind in ("perplexity", "pipeline")),
        ]
        for row, values in rows.items()
    ]
    titles = [title for corpus in corpora for title in (corpus, "in the pipeline")]
    print(format_markdown(["format", "rotation", "prefix", *titles], lines, titles=3))
    lines = [
        [row, *(f"`{sample!r}`".replace("|", r"\|") for sample in values["samples"])] for row, values in rows.items()
    ]
    print("\n" + format_markdown(["row", *prompts], lines, titles=1 + len(prompts)))


if __name__ == "__main__":
    run_main(main)
