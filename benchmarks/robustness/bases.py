"""The undamaged inputs of the robustness benchmark, made from a tiny model when they are first needed."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.tiny_gguf import write_gguf
from benchmarks.tiny_models import PROSE, make_model, make_tokenizer
from benchmarks.workspace import override, read_params
from pipeline.blocks.walk import BlockRunner
from pipeline.export.folder import export_model
from pipeline.importing.import_model import import_model
from pipeline.inference.loading import load
from pipeline.models.checkpoint import Checkpoint
from pipeline.params import parse_params
from pipeline.quantization.quantizer_init import init_quantizers
from pipeline.rotation.merging import rotate_model
from pipeline.runtime.artifacts import load_tensors, make_header

FAMILY = "llama_tied"
PREFIX = [7, 9, 0]
TOKEN_IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(1))
SAMPLE = "The house of 12 doors, émigré <s> and\n\nthe rest."
_CPU = torch.device("cpu")


class Bases:
    """Undamaged inputs in folders of `root`.

    Attributes:
        expected: "export" -> logits of `TOKEN_IDS`, and token ids of `SAMPLE`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.expected: dict[str, Any] = {}
        torch.set_num_threads(1)
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()

    def prepare(self, kind: str) -> None:
        """Make everything that mutations of a kind need."""
        needed = {
            "export": ["export"],
            "command": ["export", "texts"],
            "calls": ["export"],
            "checkpoint": ["checkpoint"],
            "gguf": ["gguf"],
        }
        for name in needed.get(kind, []):
            self.find(name)

    def find(self, name: str) -> Path:
        """Return the folder of an input: "checkpoint", "gguf", "texts" or "export"."""
        path = self.root / name
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            getattr(self, f"_make_{name}")(path)
        return path

    def _make_checkpoint(self, path: Path) -> None:
        make_model(FAMILY).save_pretrained(path)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        tokenizer.save_pretrained(path)

    def _make_gguf(self, path: Path) -> None:
        path.mkdir()
        write_gguf(path / "model.gguf", make_model(FAMILY), make_tokenizer())

    def _make_texts(self, path: Path) -> None:
        path.mkdir()
        (path / "prose.txt").write_text(PROSE, encoding="utf-8")

    def _make_export(self, path: Path) -> None:
        imported, work = self.root / "imported", self.root / "work"
        import_model(str(self.find("checkpoint")), None, torch.float32, imported)
        export_model_of(imported, work)
        shutil.move(work / "export", path)
        model, tokenizer = load(path)
        self.expected["export"] = compute_logits(model), tokenizer(SAMPLE)["input_ids"]


def export_model_of(imported: Path, work: Path) -> None:
    """Rotate, quantize and export an imported model, step by step in `work`; the result is in work/export."""
    original = Checkpoint(imported, "model")
    rotate_model(
        original,
        work / "rotation",
        r1="hadamard",
        r2="hadamard",
        r3="hadamard",
        r4="hadamard",
        r5="hadamard",
        seed=0,
        dtype=torch.float32,
        device=_CPU,
        block_size=-1,
        online_signs=False,
    )
    rotated = Checkpoint(work / "rotation", "rotation")
    changes = {"quantizer_init.mse_samples": 2, "quantizer_init.weights.rounding": "rtn"}
    prefix_token_ids = torch.tensor(PREFIX)
    init_quantizers(
        rotated,
        work / "quantized",
        params=parse_params(override(read_params(), changes)).quantizer_init,
        prefix_token_ids=prefix_token_ids,
        prefix_embeddings=original.embed(prefix_token_ids),
        token_ids=torch.randint(0, 320, (3, 24), generator=torch.Generator().manual_seed(4)),
        runner=BlockRunner(rotated, _CPU, 2),
        work_folder=work / "unfinished",
        header=make_header("quantizer_init", {}),
        text_start_token_id=None,
    )
    quantized = Checkpoint(work / "quantized", "quantizer_init")
    prefix, _ = load_tensors(quantized.folder / "prefix.safetensors", quantized.stage)
    settings = {"windows": {"prose": 2}, "targets_per_window": 47}
    export_model(
        quantized,
        prefix,
        work / "export",
        original=imported,
        max_shard_size="5GB",
        header=make_header("export", {}),
        results={"original": {"perplexity": {"prose": 2.5}, "settings": settings}},
    )


@torch.no_grad()
def compute_logits(model: Any) -> torch.Tensor:
    """Return a model's logits of `TOKEN_IDS`, [2, 12, V]."""
    return model(TOKEN_IDS % model.config.vocab_size).logits
