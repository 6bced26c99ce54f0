"""Say whether a model can be quantized, without loading its weights.

It reads config.json or the settings of a GGUF file, and names, types and shapes of tensors. For a hub id, it fetches
nothing else. `pipeline/explain.py` is the command. It adds the plan of memory, which needs params.yaml.
"""

import contextlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from pipeline.importing.expert_tensors import join_experts
from pipeline.importing.folder_source import open_folder
from pipeline.importing.import_model import check_names, open_source
from pipeline.importing.obstacles import explain_obstacles
from pipeline.importing.rewriting import rewrite_checkpoint
from pipeline.importing.source import Dropped, ModelImportError, Source, read_json_object
from pipeline.importing.wrappers import WRAPPERS, find_text_family
from pipeline.models.architectures import UnsupportedModelError, find_architecture, find_family
from pipeline.models.checkpoint import CONFIG, INDEX, build_skeleton
from pipeline.runtime.errors import reading


@dataclass(frozen=True)
class Explanation:
    """The answer.

    Attributes:
        supported: whether the model can be imported, as far as its config and tensor names tell.
        lines: the text. The first one answers the question.
        config: config of the imported model; None where it is not supported.
    """

    supported: bool
    lines: list[str]
    config: PreTrainedConfig | None = None


@dataclass(frozen=True)
class _Tensor:
    """Type and shape of a tensor, as safetensors' `get_slice` gives them."""

    dtype: str
    shape: tuple[int, ...]

    def get_dtype(self) -> str:
        return self.dtype

    def get_shape(self) -> tuple[int, ...]:
        return self.shape


@dataclass(frozen=True)
class _Headers:
    """The tensors of a file that is elsewhere, like an open safetensors file without content."""

    tensors: dict[str, _Tensor]

    def get_slice(self, name: str) -> _Tensor:
        return self.tensors[name]


def explain_source(source: str, revision: str | None = None) -> Explanation:
    """Return whether a model can be quantized, and why not.

    Args:
        source: as `model.source` in params.yaml.
        revision: revision of a hub id.

    Raises:
        ModelImportError: there is no such source, or its config.json cannot be read.
    """
    with ExitStack() as stack:
        path = Path(source).expanduser()
        is_local = source.startswith("packaged:") or path.exists() or path.suffix.lower() == ".gguf"
        if source.startswith("packaged:") or path.suffix.lower() == ".gguf" or (path.is_dir() and _holds_gguf(path)):
            return _explain_opened(source, lambda: stack.enter_context(open_source(source, revision)), True)
        folder, headers = (path, _read_headers(path, stack)) if is_local else _fetch(source, revision)
        raw = read_json_object(source, folder / CONFIG) if (folder / CONFIG).is_file() else {}
        names = tuple(headers.tensors) if headers is not None else _read_index(source, folder)
        if raw and not _is_listed(raw):
            return Explanation(False, [explain_obstacles(raw, names)])
        files = (
            None if is_local and _holds_weights(path) else dict.fromkeys(headers.tensors if headers else (), headers)
        )
        return _explain_opened(source, lambda: open_folder(source, folder, stack, files), bool(headers))


def _is_listed(raw: dict[str, Any]) -> bool:
    """Return whether the family in a config.json, or its text model's family, is supported."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        return False
    family = find_text_family(raw) if model_type in WRAPPERS else model_type
    try:
        find_family(family)
    except UnsupportedModelError:
        return False
    return True


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".bin", ".pt", ".pth") for path in folder.iterdir())


def _read_index(source: str, folder: Path) -> tuple[str, ...]:
    """Return the names of tensors in the index of a folder without weights."""
    index = read_json_object(source, folder / INDEX) if (folder / INDEX).is_file() else {}
    return tuple(index.get("weight_map") or ())


def _holds_gguf(folder: Path) -> bool:
    return not (folder / CONFIG).is_file() and any(path.suffix.lower() == ".gguf" for path in folder.iterdir())


def _read_headers(folder: Path, stack: ExitStack) -> _Headers | None:
    """Return the tensors of the safetensors files in a folder, or None where there are none."""
    tensors: dict[str, _Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(SafetensorError, OSError):  # damaged files are named by the import
            file = stack.enter_context(safe_open(path, framework="pt"))
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors |= {name: _Tensor(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    return _Headers(tensors) if tensors else None


def _fetch(source: str, revision: str | None) -> tuple[Path, _Headers | None]:
    """Return a folder with the JSON files of a hub id, and the headers of its safetensors files."""
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=["*.json"]))
        try:
            files = HfApi().get_safetensors_metadata(source, revision=revision).files_metadata.values()
        except NotASafetensorsRepoError:
            return folder, None
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelImportError(
            f"model.source={source!r}, revision={revision!r}: there is no such file or folder, and it cannot be "
            f"fetched from the Hugging Face Hub ({reason})."
        ) from None
    tensors = {name: _Tensor(info.dtype, tuple(info.shape)) for file in files for name, info in file.tensors.items()}
    return folder, _Headers(tensors)


def _explain_opened(source: str, open_model: Callable[[], Source], has_names: bool) -> Explanation:
    try:
        problem = f"model.source={source!r}: its config and tensors do not fit"
        with reading(lambda reason: ModelImportError(f"{problem} ({reason}).")):
            return _describe(source, open_model(), has_names)
    except (UnsupportedModelError, ModelImportError) as error:
        return Explanation(False, [f"Not supported: {error}"])


def _describe(source: str, opened: Source, has_names: bool) -> Explanation:
    plain = rewrite_checkpoint(opened.config, opened.names, opened.read)
    config = plain.config
    present, _ = join_experts(source, config, plain.names, plain.read)
    skeleton = build_skeleton(config)
    expected = skeleton.state_dict()
    if config.tie_word_embeddings:
        expected.pop(find_architecture(config).lm_head, None)
    dropped = dict(opened.dropped)
    notes = []
    if has_names:
        for name, part in check_names(source, set(expected), present, skeleton).items():
            dropped.setdefault(part, Dropped()).add_(opened.count_bytes(name))
    else:
        notes.append("Not checked: names of tensors, because there are no safetensors files here.")
    count = sum(expected[name].numel() for name, _ in skeleton.named_parameters() if name in expected)
    family = opened.wrapper or opened.config.model_type
    lines = [
        f"Supported: {family} is imported as {type(skeleton).__name__}, {config.num_hidden_layers} blocks, {count:,} "
        "parameters."
    ]
    lines += [f"Rewritten: {change}." for change in plain.changes]
    if opened.quantization is not None:
        lines.append(f"Stored: {opened.quantization}. These weights are read as float32, then cast to model.dtype.")
    for part, tensors in sorted(dropped.items()):
        lines.append(f"Dropped: {part} ({tensors.tensors} tensors, {tensors.bytes / 2**20:.1f} MiB).")
    return Explanation(True, lines + notes, config)
