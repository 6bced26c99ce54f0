"""Compare an exported ONNX folder with the model that the pipeline evaluated: logits, integers and perplexity.

    python -m benchmarks.quality.onnx_parity        # of a run with export.formats: [onnx]

Logits of --texts held-out texts, read in five ways by ONNX Runtime, are compared with the model of
artifacts/finetuning reading each text alone. The same model reading by token is compared as well: it computes the same
sums in another order. Differences are relative to the largest logit; a position counts by its largest one.

The integers are the outputs of the graph's QuantizeLinear nodes, compared with those of the model's quantizers. They
differ where a value lies so close to the middle between two integers that the order of float sums decides. The last
column has the same comparison with the graph's integers in place of the model's own at every site before. There,
differences do not add up, so a part that graph and model compute differently would show in its own block.

Perplexity is on the windows of artifacts/calibration/evaluation/. The difference to evaluation@export has a standard
error, from the differences of single windows. The same model in float64 is compared as well: it differs by nothing but
the rounding of sums.

    python -m benchmarks.quality.onnx_parity --row exports/W8A16-merged-found

compares a row that `benchmarks.quality.onnx --keep exports` kept, without perplexity, which that program prints.
"""

import math
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

from benchmarks.quality.onnx import CHECKPOINT, measure_loss, measure_losses, start_token_list
from pipeline.blocks.prefix_kv import PREFIX, load_prefix_kv
from pipeline.inference.prefixed_model import assemble_model
from pipeline.interop.onnx_session import OnnxModel, make_options
from pipeline.models.checkpoint import Checkpoint
from pipeline.numerics.quantizer import ActivationQuantizer
from pipeline.pictures.tables import format_markdown
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.artifacts import load_tensors
from pipeline.runtime.errors import run_main
from pipeline.text.windows import load_start_token, load_windows

EQUAL = 1e-4  # of the largest logit
_PADDING = 3  # tokens that each text of a padded batch has more than the text before
FOLDER = Path("artifacts/export_formats/onnx")
FINETUNING = Path("artifacts/finetuning")
WINDOWS = Path("artifacts/calibration/evaluation")
EVALUATED = Path("artifacts/evaluation/export.safetensors")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(), help="folder with artifacts/")
    parser.add_argument("--row", type=Path, help="folder of a row of benchmarks.quality.onnx, in place of the export")
    parser.add_argument("--texts", type=whole(1), default=8)
    parser.add_argument("--tokens", type=whole(2), default=64, help="of each text")
    parser.add_argument("--windows", type=whole(1), default=8, help="of each corpus for perplexity, at most")
    parser.add_argument("--threads", type=whole(1), default=2, help="of ONNX Runtime")
    options = parser.parse_args()
    run: Path = options.run
    if options.row is None:
        folder, checkpoint = run / FOLDER, Checkpoint(run / FINETUNING, "finetuning")
    else:
        folder, checkpoint = options.row, Checkpoint(options.row / CHECKPOINT, "quantizer_init")
    start_token = load_start_token(checkpoint.folder / PREFIX, checkpoint.stage)
    model = assemble_model(checkpoint, load_prefix_kv(checkpoint.folder, checkpoint.stage))
    session = OnnxModel(folder, options.threads)
    held_out = {path.stem: load_windows(path).token_ids for path in sorted((run / WINDOWS).glob("*.safetensors"))}
    texts = cut_texts(torch.cat(list(held_out.values())), options.texts, options.tokens, start_token)
    print(compare_logits(model, session, texts))
    print("\n" + compare_integers(model, session, folder, texts))
    if options.row is not None:
        return
    evaluated, _ = load_tensors(run / EVALUATED, "evaluation")
    losses = {corpus: evaluated[f"loss.{corpus}"] for corpus in held_out}
    windows = {corpus: token_ids[: options.windows] for corpus, token_ids in held_out.items()}
    print("\n" + compare_perplexity(model.double(), session, windows, losses, start_token))


@torch.no_grad()
def compare_perplexity(
    wide_model: PreTrainedModel,
    session: OnnxModel,
    windows: dict[str, torch.Tensor],
    losses: dict[str, torch.Tensor],
    start_token: int | None,
) -> str:
    """Return a Markdown table of perplexity in ONNX Runtime and of the model in float64.

    Args:
        wide_model: in float64.
        windows: corpus -> token ids [N, T].
        losses: corpus -> the losses of its first windows that evaluation@export measured, [N] or more.
    """
    start = torch.tensor(start_token_list(start_token), dtype=torch.int64)
    lines = []
    for corpus, token_ids in windows.items():
        expected = losses[corpus][: len(token_ids)].double()
        read = [wide_model(torch.cat((start, window))[None]).logits[0, len(start) :] for window in token_ids]
        readings = {
            "ONNX Runtime": measure_losses(session, token_ids, start_token),
            "the model in float64": torch.stack([measure_loss(*pair) for pair in zip(read, token_ids, strict=True)]),
        }
        for name, measured in readings.items():
            lines.append(
                [
                    name,
                    corpus,
                    f"{len(token_ids)} x {token_ids.shape[1]}",
                    *(f"{values.mean().exp():.4f}" for values in (measured, expected)),
                    format_difference(measured - expected),
                ]
            )
    head = ["", "corpus", "windows", "perplexity", "evaluation@export", "difference"]
    return format_markdown(head, lines, titles=2)


def format_difference(differences: torch.Tensor) -> str:
    """Return the relative difference of perplexities with its standard error, from the losses of windows [N]."""
    change = f"{math.expm1(differences.mean().item()):+.2%}"
    if len(differences) == 1:
        return change
    return f"{change} ± {differences.std().item() / math.sqrt(len(differences)):.2%}"


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
    """Return a Markdown table of the integers that differ between graph and model, for each block, and a sentence.

    Args:
        texts: [N, T].
    """
    measured, logits = run_integers(session, folder, texts)
    expected, _ = record_integers(model, texts)
    local, local_logits = record_integers(model, texts, measured)
    lines = []
    for block in range(model.config.num_hidden_layers):
        names = [name for name in measured if name.startswith(f"layers.{block}.")]
        steps = {name: measured[name] - expected[name] for name in names}
        every = torch.cat([values.flatten() for values in steps.values()])
        worst = max(steps, key=lambda name: _share(steps[name]))
        lines.append(
            [
                str(block),
                f"{_share(every):.4%}",
                f"{_share(every, 1):.4%}",
                str(int(every.abs().max())),
                f"{every[every != 0].double().mean():+.3f}",
                f"{re.sub(rf'layers.{block}.', '', worst)}, {_share(steps[worst]):.4%}",
                f"{_share(torch.cat([(measured[name] - local[name]).flatten() for name in names])):.4%}",
            ]
        )
    head = ["block", "integers differ", "by 2 or more", "largest", "mean of those", "most at", "after equal integers"]
    largest = (logits - local_logits).abs().max() / local_logits.abs().max()
    return (
        f"{format_markdown(head, lines)}\n\nAfter equal integers at every site, logits differ by {largest:.1e} of the "
        "largest."
    )


def _share(steps: torch.Tensor, least: int = 0) -> float:
    """Return the share of differences whose absolute value exceeds `least`."""
    return (steps.abs() > least).double().mean().item()


def record_integers(
    model: PreTrainedModel, texts: torch.Tensor, replacements: dict[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the name of each static quantizer of the blocks -> its integers for texts [N, T]; and the logits.

    Args:
        replacements: the same names -> integers that the model uses in place of its own; None: it uses its own.
    """
    integers: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.base_model.named_modules():
        if isinstance(module, ActivationQuantizer) and module.spec.enabled:

            def record(quantizer: Any, inputs: Any, output: torch.Tensor, name: str = name) -> torch.Tensor | None:
                # One group for the whole last dimension: the graph has no others.
                zero_point = 0 if quantizer.spec.symmetric else quantizer.zero_point
                integers[name] = ((quantizer.center(output) / quantizer.scale).round() + zero_point).int()
                if replacements is None:
                    return None
                values = (replacements[name] - zero_point) * quantizer.scale
                return values + quantizer.shift if quantizer.spec.centered else values

            hooks.append(module.register_forward_hook(record))
    logits = model(texts).logits
    for hook in hooks:
        hook.remove()
    return integers, logits


def run_integers(session: OnnxModel, folder: Path, texts: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the name of each quantizer of the graph's blocks -> its integers for texts [N, T]; and the logits."""
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
    feed = session.make_feed(texts.numpy(), np.ones(texts.shape, np.int64), None)
    logits, *outputs = exposed.run(["logits", *nodes], feed)
    pairs = zip(nodes.values(), outputs, strict=True)
    integers = {name: torch.from_numpy(np.asarray(codes).astype(np.int32)) for name, codes in pairs}
    return integers, torch.from_numpy(np.asarray(logits))


if __name__ == "__main__":
    run_main(main)
