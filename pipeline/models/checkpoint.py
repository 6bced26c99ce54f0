"""A Hugging Face checkpoint folder, read and written block by block.

Every folder this project writes has one shard per decoder layer and one for the rest, so that a walk opens one small
file at a time and a stage that stops half-way has whole blocks on disk:

    config.json  generation_config.json  tokenizer files  artifact.json
    model.safetensors.index.json
    embeddings.safetensors            embedding, final norm, lm_head (absent when tied)
    block-00000.safetensors  …

It stays an ordinary checkpoint: transformers loads it through the index. What is *not* ordinary is recorded under the
key `prefixquant` of config.json: online rotations the weights count on, and quantizers (see `blocks/quantized.py`).
"""

import copy
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.models.architectures import Architecture, find_architecture, find_logit_cap
from pipeline.models.lm_head import LmHead
from pipeline.runtime.artifacts import (
    FOLDER_HEADER,
    ArtifactError,
    Header,
    load_json,
    make_content_header,
    make_header,
    open_tensors,
    read_header,
    save_tensors,
    write_folder_header,
    write_json,
)
from pipeline.runtime.errors import reading

CONFIG = "config.json"
CONFIG_KEY = "prefixquant"
REPORT = "report.json"
INDEX = "model.safetensors.index.json"
EMBEDDINGS = "embeddings.safetensors"
BLOCK = "block-{index:05d}.safetensors"
CHAT_TEMPLATES = "additional_chat_templates"  # a folder, as transformers names it


class Checkpoint:
    """Reads a folder written by `CheckpointWriter`.

    Attributes:
        folder, stage, header: where it is, who wrote it, what it was made from.
        config: the transformers config; its `dtype` is the dtype all computation on this checkpoint runs in.
        settings: what config.json says under `prefixquant`: online rotations and quantizers, {} for a plain model.
        architecture: names of its parts.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        """Raises ArtifactError when the folder is missing or foreign, UnsupportedModelError on other families."""
        self.folder = Path(folder)
        self.stage = stage
        self.header: Header = read_header(self.folder, stage) if self.folder.is_dir() else self._missing()
        self.settings: dict[str, Any] = self.read_config().get(CONFIG_KEY, {})
        with reading(lambda why: ArtifactError(f"{self.folder / CONFIG} is damaged ({why}); make the artifact anew")):
            self.config = AutoConfig.from_pretrained(self.folder)
        self.architecture: Architecture = find_architecture(self.config)
        self.config._attn_implementation = self.architecture.kernel

    def _missing(self) -> Header:
        return read_header(self.folder / FOLDER_HEADER, self.stage)  # raises, naming the stage to rerun

    def read_config(self) -> dict[str, Any]:
        """config.json as it stands, to be changed and written again."""
        values = load_json(self.folder / CONFIG, self.stage)
        if not isinstance(values, dict):
            raise ArtifactError(f"{self.folder / CONFIG} is no JSON object; make the artifact anew")
        return values

    @property
    def block_count(self) -> int:
        return self.config.num_hidden_layers

    @property
    def dtype(self) -> torch.dtype:
        return self.config.dtype

    @functools.cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    @functools.cached_property
    def _skeleton(self) -> nn.Module:
        return build_skeleton(self.config)

    def build_block(self, index: int) -> nn.Module:
        """Decoder layer `index` of the model's own class, in eval mode, its parameters on the meta device.

        Its `layer_idx` is 0: a walk gives each block a cache with a single layer.
        """
        block = copy.deepcopy(self._skeleton.model.layers[index])
        block.self_attn.layer_idx = 0
        return block.eval()

    def build_rotary_embedding(self) -> nn.Module:
        """The model's rotary embedding, on the CPU (it has no weights; on meta its buffers would be lost)."""
        return type(self._skeleton.model.rotary_emb)(self.config)

    def load_block_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of block `index`, named as inside the block (`self_attn.q_proj.weight`)."""
        return load_block_file(self.folder, self.architecture, index, self.stage)

    def load_tensor(self, name: str) -> torch.Tensor:
        """One tensor of the embeddings shard, by its full name; lm_head of a tied model is its embedding."""
        with open_tensors(self.folder / EMBEDDINGS, self.stage) as (file, _):
            if name == self.architecture.lm_head and self.config.tie_word_embeddings:
                name = self.architecture.embedding
            return file.get_tensor(name)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """What stands before block 0, [..., D], for token ids [...], in the checkpoint's dtype."""
        return self.scale_embeddings(nn.functional.embedding(token_ids, self.load_tensor(self.architecture.embedding)))

    def scale_embeddings(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [..., D] of the embedding table in the checkpoint's dtype, times the factor some families have."""
        rows = rows.to(self.dtype)
        factor = getattr(self._skeleton.model.embed_tokens, "scalar_embed_scale", None)
        return rows if factor is None else rows * torch.tensor(factor).to(self.dtype)

    def build_embedding(self, weight: torch.Tensor) -> nn.Module:
        """The model's own embedding of a table [V, D], with its factor, which is no tensor of the checkpoint."""
        embedding = copy.deepcopy(self._skeleton.model.embed_tokens)
        if hasattr(embedding, "scalar_embed_scale"):
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=weight.device)
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        return embedding

    def load_final_norm(self) -> nn.Module:
        norm = copy.deepcopy(self._skeleton.model.norm)
        weight = self.load_tensor(self.architecture.final_norm).to(self.dtype)
        norm.load_state_dict({"weight": weight}, assign=True)
        return norm.eval()

    @torch.no_grad()
    def apply_final_norm_(self, hidden: torch.Tensor) -> None:
        """Replace hidden states [N, T, D] behind the last block, window by window."""
        norm = self.load_final_norm()
        for window in hidden:
            window.copy_(norm(window))

    def load_lm_head(self) -> LmHead:
        """lm_head in the checkpoint's dtype (a bias-free linear in every supported family)."""
        return LmHead(self.load_tensor(self.architecture.lm_head).to(self.dtype), find_logit_cap(self.config))


class CheckpointWriter:
    """Fills a folder that `Checkpoint` reads; use inside `replacing_folder`, so that half a checkpoint never shows."""

    def __init__(self, folder: Path, architecture: Architecture, stage: str, header: Header | None = None) -> None:
        """Without a `header` each shard is fingerprinted by its content (an imported model has no other identity)."""
        self.folder = Path(folder)
        self.architecture = architecture
        self.stage = stage
        self.header = header
        self._index: dict[str, str] = {}
        self._shards: dict[str, str] = {}
        self._bytes = 0

    def write_block(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write block `index`; names as inside the block."""
        prefix = self.architecture.tensor_prefix(index)
        self._write(BLOCK.format(index=index), {prefix + name: tensor for name, tensor in tensors.items()})

    def adopt_block(self, index: int, path: Path) -> None:
        """Take over a finished shard of block `index` (names in full) from elsewhere on this disk."""
        target = self.folder / BLOCK.format(index=index)
        try:
            os.link(path, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, target)
        with open_tensors(target, self.stage) as (file, header):
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._register(target.name, tensors, header)

    def write_embeddings(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write embedding, final norm and lm_head; full names."""
        self._write(EMBEDDINGS, tensors)

    def _write(self, file_name: str, tensors: dict[str, torch.Tensor]) -> None:
        header = self.header or make_content_header(self.stage, tensors)
        save_tensors(self.folder / file_name, tensors, header)
        self._register(file_name, tensors, header)

    def _register(self, file_name: str, tensors: dict[str, torch.Tensor], header: Header) -> None:
        self._shards[file_name] = header.fingerprint
        self._index |= dict.fromkeys(tensors, file_name)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def finish(self, config: dict[str, Any], settings: dict[str, Any]) -> None:
        """Write the index, config.json and the folder's header; `settings` go under `prefixquant` if there are any."""
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._index.items()))}
        write_json(self.folder / INDEX, index)
        write_json(self.folder / CONFIG, config | ({CONFIG_KEY: settings} if settings else {}))
        content = {"shards": self._shards, "config": config, "settings": settings}
        write_folder_header(self.folder, self.header or make_header(self.stage, content))


def save_block_file(
    folder: Path, architecture: Architecture, index: int, tensors: dict[str, torch.Tensor], header: Header
) -> None:
    """A block's shard by itself, for `CheckpointWriter.adopt_block`; names as inside the block."""
    prefix = architecture.tensor_prefix(index)
    save_tensors(folder / BLOCK.format(index=index), {prefix + name: t for name, t in tensors.items()}, header)


def load_block_file(folder: Path, architecture: Architecture, index: int, stage: str) -> dict[str, torch.Tensor]:
    """The tensors of a block's shard, named as inside the block. Raises ArtifactError."""
    prefix = architecture.tensor_prefix(index)
    with open_tensors(folder / BLOCK.format(index=index), stage) as (file, _):
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def build_skeleton(config: Any) -> nn.Module:
    """The whole model of a config on the meta device: every module and name, no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=find_architecture(config).kernel)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files that make a checkpoint usable with its tensors: tokenizer, chat templates, generation config.

    Chat templates for special uses lie in a folder of their own. Files that a stage wrote about its own work are left
    out.
    """
    for path in list_companions(source):
        file = target / path.relative_to(source)
        file.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, file)


def list_companions(folder: Path) -> list[Path]:
    """Return the files that `copy_companions` copies."""
    suffixes, others = {".json", ".jinja", ".txt", ".model"}, {CONFIG, INDEX, FOLDER_HEADER, REPORT}
    paths = [path for path in sorted(folder.glob("*")) if path.suffix in suffixes and path.name not in others]
    return [path for path in (*paths, *sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))) if path.is_file()]
