"""Compare an exported ONNX folder with the model that the pipeline evaluated: logits, integers and perplexity.

    python -m benchmarks.quality.onnx_parity        # of a run with export.formats: [onnx]

Logits of --texts held-out texts, read in five ways by ONNX Runtime, are compared with the model of
artifacts/finetuning reading each text alone. The same model reading by token is compared as well: it computes the same
sums in another order. Differences are relative to the largest logit; a position counts by its largest one.

The integers are the outputs of the graph's QuantizeLinear nodes, compared with those of the model's quantizers. They
differ where a value lies so close to the middle between two integers that the order of float sums decides.

Perplexity is on the windows of artifacts/calibration/evaluation/, as evaluation@export measured it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from benchmarks.quality.onnx import measure_perplexity, start_token_list
from pipeline.blocks.prefix_kv import PREFIX, load_prefix_kv
from pipeline.inference.prefixed_model import assemble_model
from pipeline.interop.onnx_session import OnnxModel, make_options
from pipeline.models.checkpoint import Checkpoint
from pipeline.numerics.quantizer import ActivationQuantizer
from pipeline.pictures.tables import format_markdown
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.errors import run_main
from pipeline.text.windows import load_start_token, load_windows

EQUAL = 1e-4  # of the largest logit
_PADDING = 3  # tokens that each text of a padded batch has more than the text before
FOLDER = Path("artifacts/export_formats/onnx")
FINETUNING = Path("artifacts/finetuning")
WINDOWS = Path("artifacts/calibration/evaluation")
METRICS = Path("metrics/evaluation/export.json")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(), help="folder with artifacts/ and metrics/")
    parser.add_argument("--texts", type=whole(1), default=8)
    parser.add_argument("--tokens", type=whole(2), default=64, help="of each text")
    parser.add_argument("--windows", type=whole(1), default=8, help="of each corpus for perplexity, at most")
    parser.add_argument("--threads", type=whole(1), default=2, help="of ONNX Runtime")
    options = parser.parse_args()
    run: Path = options.run
    checkpoint = Checkpoint(run / FINETUNING, "finetuning")
    start_token = load_start_token(run / FINETUNING / PREFIX, "finetuning")
    model = assemble_model(checkpoint, load_prefix_kv(checkpoint.folder, checkpoint.stage))
    session = OnnxModel(run / FOLDER, options.threads)
    held_out = {path.stem: load_windows(path).token_ids for path in sorted((run / WINDOWS).glob("*.safetensors"))}
    texts = cut_texts(torch.cat(list(held_out.values())), options.texts, options.tokens, start_token)
    print(compare_logits(model, session, texts))
    print("\n" + compare_integers(model, session, run / FOLDER, texts))
    evaluated = json.loads((run / METRICS).read_text(encoding="utf-8"))["perplexity"]
    lines = []
    for corpus, windows in held_out.items():
        perplexity = measure_perplexity(session, windows[: options.windows], start_token)
        lines.append(
            [
                corpus,
                f"{min(options.windows, len(windows))} x {windows.shape[1]}",
                f"{perplexity:.4f}",
                f"{evaluated[corpus]:.4f}",
                f"{perplexity / evaluated[corpus] - 1:+.3%}",
            ]
        )
    head = ["perplexity", "windows", "ONNX Runtime", "evaluation@export", "difference"]
    print("\n" + format_markdown(head, lines))


def cut_texts(windows: torch.Tensor, count: int, tokens: int, start_token: int | None) -> torch.Tensor:
    """Return the beginnings of windows [N, T] after the start token, if there is one: [count, tokens]."""
    start = torch.tensor(start_token_list(start_token), dtype=torch.int64).expand(len(windows), -1)
    return torch.cat((start, windows), 1)[:count, :tokens]


@torch.no_grad()
def compare_logits(model: PreTrainedModel, session: OnnxModel, texts: torch.Tensor) -> str:
    """Return a Markdown table of the differences to the model's logits, for each way to read texts [N, T]."""
    expected = [model(text[None]).logits[0] for text in texts]
    readings = {
        "ONNX Runtime, each text alone": (read(session, text[None])[0] for text in texts),
        "ONNX Runtime, all in a batch": iter(read(session, texts)),
        "ONNX Runtime, a padded batch": read_padded(session, texts),
        "ONNX Runtime, by token": (read_by_token(session, text[None])[0] for text in texts),
        "ONNX Runtime, by token in a batch": iter(read_by_token(session, texts)),
        "the model itself, by token": (read_model_by_token(model, text) for text in texts),
    }
    head = ["", "positions", f"within {EQUAL:g}", "median", "99 %", "largest", "same first token", "KL, nats"]
    return format_markdown(head, [[name, *describe(rows, expected)] for name, rows in readings.items()])


def describe(rows: Iterator[torch.Tensor], expected: list[torch.Tensor]) -> list[str]:
    """Return the cells of a table for logits of the beginnings of texts, each [≤ T, V]."""
    differences, agreements, divergences = [], [], []
    for logits, whole_text in zip(rows, expected, strict=True):
        reference = whole_text[: len(logits)]
        differences.append((logits - reference).abs().amax(-1) / reference.abs().max())
        agreements.append((logits.argmax(-1) == reference.argmax(-1)).float())
        log_p, log_q = (values.double().log_softmax(-1) for values in (reference, logits))
        divergences.append(kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
    difference, agreement, divergence = map(torch.cat, (differences, agreements, divergences))
    return [
        str(len(difference)),
        f"{(difference < EQUAL).float().mean():.1%}",
        *(f"{value:.1e}" for value in (difference.median(), difference.quantile(0.99), difference.max())),
        f"{agreement.mean():.1%}",
        f"{divergence.mean():.1e}",
    ]


def read(session: OnnxModel, texts: torch.Tensor) -> torch.Tensor:
    """Return the logits of texts [B, T] in one call, [B, T, V]."""
    return torch.from_numpy(session.read(texts.numpy())[0])


def read_padded(session: OnnxModel, texts: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the logits of the beginning of each text, from one call: text n has n * _PADDING tokens less."""
    count, tokens = texts.shape
    padded, mask = np.zeros((count, tokens), np.int64), np.zeros((count, tokens), np.int64)
    starts = [min(row * _PADDING, tokens - 1) for row in range(count)]
    for row, start in enumerate(starts):
        padded[row, start:], mask[row, start:] = texts[row, : tokens - start].numpy(), 1
    logits, _ = session.read(padded, mask=mask)
    for row, start in enumerate(starts):
        yield torch.from_numpy(logits[row, start:])


def read_by_token(session: OnnxModel, texts: torch.Tensor) -> torch.Tensor:
    """Return the logits of texts [B, T], one call for each token, [B, T, V]."""
    state, parts = None, []
    for token in range(texts.shape[1]):
        logits, state = session.read(texts[:, token : token + 1].numpy(), state)
        parts.append(logits)
    return torch.from_numpy(np.concatenate(parts, 1))


def read_model_by_token(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    """Return the model's logits of a text [T], one forward for each token, [T, V]."""
    cache, parts = None, []
    for token in text.tolist():
        output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits[0])
    return torch.cat(parts)


@torch.no_grad()
def compare_integers(model: PreTrainedModel, session: OnnxModel, folder: Path, texts: torch.Tensor) -> str:
    """Return a Markdown table of the integers that differ between graph and model, for each block.

    Args:
        texts: [N, T].
    """
    expected = record_integers(model, texts)
    measured = run_integers(session, folder, texts)
    lines = []
    for block in range(model.config.num_hidden_layers):
        names = [name for name in measured if name.startswith(f"layers.{block}.")]
        steps = {name: (measured[name] - expected[name]).abs() for name in names}
        every = torch.cat([values.flatten() for values in steps.values()])
        worst = max(steps, key=lambda name: (steps[name] > 0).double().mean().item())
        shares = [(every > least).double().mean().item() for least in (0, 1)]
        cells = [str(block), *(f"{share:.4%}" for share in shares), str(int(every.max()))]
        lines.append([*cells, f"{re.sub(rf'layers.{block}.', '', worst)}, {(steps[worst] > 0).double().mean():.4%}"])
    return format_markdown(["block", "integers differ", "by 2 or more", "largest, steps", "most at"], lines)


def record_integers(model: PreTrainedModel, texts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the name of each static quantizer of the blocks -> its integers for texts [N, T]."""
    integers: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.base_model.named_modules():
        if isinstance(module, ActivationQuantizer) and module.spec.enabled:

            def record(quantizer: Any, inputs: Any, output: torch.Tensor, name: str = name) -> None:
                values = quantizer.center(output).unflatten(-1, (-1, output.shape[-1]))
                zero_point = 0 if quantizer.spec.symmetric else quantizer.zero_point[..., None]
                codes = (values / quantizer.scale[..., None]).round() + zero_point
                integers[name] = codes.flatten(-2).int()

            hooks.append(module.register_forward_hook(record))
    model(texts)
    for hook in hooks:
        hook.remove()
    return integers


def run_integers(session: OnnxModel, folder: Path, texts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the name of each quantizer of the graph's blocks -> its integers for texts [N, T]."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = {
        node.output[0]: node.input[1].removeprefix("body.").removesuffix(".scale")
        for node in graph.graph.node
        if node.op_type == "QuantizeLinear"
    }
    graph.graph.output.extend(onnx.ValueInfoProto(name=output) for output in nodes)
    options = make_options()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    exposed = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = exposed.run(list(nodes), session.make_feed(texts.numpy(), np.ones(texts.shape, np.int64), None))
    pairs = zip(nodes.values(), outputs, strict=True)
    return {name: torch.from_numpy(np.asarray(codes).astype(np.int32)) for name, codes in pairs}


if __name__ == "__main__":
    run_main(main)
