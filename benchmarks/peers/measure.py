"""Measure one quantized model: the same functions for every tool.

This module runs in the environment of a tool, where this project is not installed. It imports torch, safetensors and
the standard library only. A tool's script is `quantize_with_TOOL.py METHOD --model FOLDER --inputs FILE --out FOLDER
--row FILE`. It fills `METHODS`, and calls `run_method`.
"""

import argparse
import inspect
import json
import math
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file

CALIBRATION, TRAINING = "calibration", "training"  # tensors of --inputs; every other tensor is a text to measure on
_BYTES = {"F64": 2, "F32": 2, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8}


class Model(Protocol):
    """A causal language model as transformers defines it."""

    def __call__(self, input_ids: torch.Tensor, *, use_cache: bool) -> "Output": ...


class Output(Protocol):
    """Outputs of a model; `logits` is [B, T, V]."""

    logits: torch.Tensor


@dataclass(frozen=True)
class Job:
    """The work of a method.

    Attributes:
        model: the folder of the original model.
        windows: token ids for calibration [N, T].
        training_windows: token ids for tools that train [M, T]. They contain `windows`.
        out: the folder to write the quantized model to.
    """

    model: Path
    windows: torch.Tensor
    training_windows: torch.Tensor
    out: Path


@dataclass(frozen=True)
class Quantized:
    """The result of a method.

    Attributes:
        model: the quantized model, ready for `measure_perplexity`.
        save: writes its files to `Job.out`, after measuring; None: they are there, or `mib` is given.
        mib: its size; None: that of the files in `Job.out`.
        seconds, gib: time and peak memory of quantizing; None: the CPU seconds of the method, which do not depend on
            other programs, and the peak of this process until now.
    """

    model: Model
    save: Callable[[], object] | None = None
    mib: float | None = None
    seconds: float | None = None
    gib: float | None = None


Method = Callable[[Job], Quantized]


def run_method(methods: dict[str, Method], description: str | None) -> None:
    """Run the method that the command line names, and write its row."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=methods)
    parser.add_argument("--model", type=Path, required=True, help="the folder of the original model")
    parser.add_argument("--inputs", type=Path, required=True, help="a safetensors file with windows of token ids")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the quantized model")
    parser.add_argument("--packages", nargs="*", default=[], help="packages whose versions are noted")
    parser.add_argument("--row", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    texts = load_file(arguments.inputs)
    windows, training_windows = texts.pop(CALIBRATION), texts.pop(TRAINING)
    torch.manual_seed(0)
    method = methods[arguments.method]
    start = time.process_time()
    quantized = method(Job(arguments.model, windows, training_windows, arguments.out))
    seconds = time.process_time() - start if quantized.seconds is None else quantized.seconds
    gib = read_peak_gib() if quantized.gib is None else quantized.gib
    perplexities = {name: round(measure_perplexity(quantized.model, ids), 3) for name, ids in texts.items()}
    if quantized.save is not None:
        quantized.save()
    row = {
        "perplexity": perplexities,
        "mib": round(count_mib(arguments.out) if quantized.mib is None else quantized.mib, 1),
        "seconds": round(seconds),
        "gib": round(gib, 2),
        "settings": " ".join((inspect.getdoc(method) or "").split()),
        "versions": {name: metadata.version(name) for name in arguments.packages},
    }
    arguments.row.write_text(json.dumps(row, indent=2), encoding="utf-8")


@torch.no_grad()
def measure_perplexity(model: Model, windows: torch.Tensor) -> float:
    """Return the perplexity of windows [N, T]: exp of the mean loss of every token but the first of its window."""
    losses = []
    for ids in windows:
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]).double())
    return math.exp(torch.stack(losses).mean())


def count_mib(folder: Path) -> float:
    """Return the MiB of the tensors in a folder's safetensors files.

    Numbers of 32 and 64 bits with a fraction count as 16 bits, because some tools write the dtype they computed in. An
    output head that equals the embeddings counts once.
    """
    tied = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False)
    sizes = dict(_list_sizes(sorted(folder.glob("*.safetensors"))))
    if tied:
        sizes.pop("lm_head.weight", None)
    return sum(sizes.values()) / 2**20


def _list_sizes(files: Iterable[Path]) -> Iterable[tuple[str, int]]:
    """Yield the name and the bytes of every tensor."""
    for file in files:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield name, math.prod(tensor["shape"]) * _BYTES[tensor["dtype"]]


def read_peak_gib() -> float:
    """Return the peak resident memory of this process in GiB. Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
