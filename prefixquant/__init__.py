"""Quantize a Hugging Face causal language model with PrefixQuant, and load the result: two calls.

    import prefixquant

    prefixquant.quantize("HuggingFaceTB/SmolLM2-135M-Instruct", "quantized", texts=["my.txt"])
    model, tokenizer = prefixquant.load("quantized")

After `import prefixquant`, `transformers.AutoModelForCausalLM.from_pretrained("quantized")` works too. The import takes
milliseconds: torch and transformers are imported when they are needed. The command `prefixquant` does the same as these
functions (`command.py`). The library is in `pipeline`, and the stages that `quantize` runs are in `stages`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefixquant.hidden_packages import check_not_hidden

check_not_hidden("pipeline")

from pipeline.version import VERSION  # noqa: E402
from prefixquant.registration import register_with_transformers  # noqa: E402

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["__version__", "load", "quantize"]

__version__ = VERSION
register_with_transformers()


def load(
    folder: Path | str,
    device: "torch.device | str | None" = None,
    arithmetic: Literal["float", "integer"] = "float",
    **options: Any,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load an exported model and its tokenizer, after checking every file of the folder.

    Args:
        folder: an exported folder.
        device: device of the model; None for the CPU, or for the devices of `device_map` in `options`.
        arithmetic: `float` computes the numbers that were evaluated. `integer` multiplies integers, on CPUs only, which
            is faster.
        options: passed to `from_pretrained` (device_map, dtype, …).

    Raises:
        ExportError: the folder is not an exported one, is damaged or incomplete, or of another format.
    """
    from pipeline.inference.loading import load as load_export

    return load_export(Path(folder), device, arithmetic, **options)


def quantize(
    source: Path | str,
    out: Path | str,
    *,
    texts: Sequence[Path | str] = (),
    recipe: str = "w4a4kv4",
    bits: str | None = None,
    finetune: Literal["none", "short", "long"] | None = None,
    settings: Mapping[str, Any] | None = None,
    work: Path | str | None = None,
    clean: bool = False,
) -> Path:
    """Quantize a model, write the result to the folder `out`, and return that path.

    The run lives in a work folder, which is a DVC project of its own. A call that was interrupted continues there, and
    a call with other settings reuses every result that they do not change. Nothing is written elsewhere.

    Args:
        source: a folder with config.json and safetensors, a .gguf file, a Hugging Face Hub id or
            `packaged:smollm2-135m`.
        out: a new or empty folder, or an exported one, which is replaced at the end.
        texts: files or folders of text for calibration and evaluation. Without any, the packaged corpora are used.
        recipe: a preset that names no model; `prefixquant quantize --help` lists them.
        bits: bits of weights, activations and KV cache, such as "W4A8KV4"; None: the bits of the recipe.
        finetune: none: no training | short: the default | long: the same on four times as much text. None: as the
            recipe.
        settings: keys of params.yaml with dots -> value, such as {"calibration.train.windows": 64}. They override all
            others.
        work: the work folder; None: `out` with `.work` added.
        clean: whether the work folder is removed at the end.

    Raises:
        PipelineError: an argument cannot be used, which is checked before any work, or the run failed.
    """
    from prefixquant.project import Request, run_request

    request = Request(
        source=str(source),
        out=Path(out),
        texts=tuple(map(str, texts)),
        recipe=recipe,
        bits=bits,
        finetune=finetune,
        settings=dict(settings or {}),
        work=None if work is None else Path(work),
        clean=clean,
    )
    return run_request(request)
