"""A Hugging Face checkpoint folder, read and written block by block.

Every checkpoint of this project has one shard per decoder layer and one for the rest. So a walk opens one small file at
a time, and a stage that stops half-way leaves whole blocks on disk:

    config.json  generation_config.json  tokenizer files  artifact.json
    model.safetensors.index.json
    embeddings.safetensors            embedding, final norm, lm_head (absent when tied), its scales if it has 8 bits
    block-00000.safetensors  …

It is an ordinary checkpoint, which transformers loads through the index. Everything that is *not* ordinary is recorded
in config.json under the key `prefixquant`: the online rotations that the weights expect, the quantizers (see
`blocks/quantized.py`), and `lm_head` where that is quantized (see `lm_head.py`).
"""

import copy
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from pipeline.models.architectures import Architecture, find_architecture, find_logit_cap, find_widest_window
from pipeline.models.experts import EAGER, route_experts_, split_experts, stack_experts
from pipeline.models.layers import CausalModel, DecoderLayer, Norm, as_causal_model, as_decoder_layer, list_layers
from pipeline.models.lm_head import LmHead, QuantizedHead, find_head
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
from pipeline.runtime.files import CHAT_TEMPLATES

CONFIG = "config.json"
CONFIG_KEY = "prefixquant"
LM_HEAD = "lm_head"  # in the settings of a checkpoint, where lm_head is quantized: {"bits": 8, "rotate": …}
REPORT = "report.json"
INDEX = "model.safetensors.index.json"
EMBEDDINGS = "embeddings.safetensors"
BLOCK = "block-{index:05d}.safetensors"


class Checkpoint:
    """Reads a folder written by `CheckpointWriter`.

    Attributes:
        folder: where it is.
        stage: the stage that wrote it.
        header: the origin of the artifact.
        config: the transformers config; all computation on this checkpoint is in its `dtype`.
        settings: the value of `prefixquant` in config.json, online rotations and quantizers; {} for a plain model.
        architecture: the names of its parts.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        """Open a folder.

        Raises:
            ArtifactError: the folder is missing, damaged, or was written by another stage or program.
            UnsupportedModelError: the model's family is not supported.
        """
        self.folder = Path(folder)
        self.stage = stage
        self.header: Header = read_header(self.folder, stage) if self.folder.is_dir() else self._missing()
        self.settings: dict[str, Any] = self.read_config().get(CONFIG_KEY, {})
        path = self.folder / CONFIG
        with reading(lambda reason: ArtifactError(f"{path} is damaged ({reason}). Make the artifact again.")):
            self.config = AutoConfig.from_pretrained(self.folder)
        self.architecture: Architecture = find_architecture(self.config)
        self.config._attn_implementation = self.architecture.kernel
        self.config._experts_implementation = EAGER

    def _missing(self) -> Header:
        return read_header(self.folder / FOLDER_HEADER, self.stage)  # raises, naming the stage to rerun

    def read_config(self) -> dict[str, Any]:
        """Return the content of config.json, for example to change it and write it again."""
        values = load_json(self.folder / CONFIG, self.stage)
        if not isinstance(values, dict):
            raise ArtifactError(f"{self.folder / CONFIG} is not a JSON object. Make the artifact again.")
        return values

    @property
    def block_count(self) -> int:
        """The number of decoder layers."""
        return self.config.num_hidden_layers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all computation on this checkpoint."""
        dtype = self.config.dtype
        if not isinstance(dtype, torch.dtype):
            raise ArtifactError(f"{self.folder / CONFIG}: dtype={dtype!r} is not a dtype. Make the artifact again.")
        return dtype

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.folder)

    @functools.cached_property
    def _skeleton(self) -> CausalModel:
        return build_skeleton(self.config)

    @functools.cached_property
    def widest_window(self) -> int | None:
        """The largest sliding window of its layers in positions; None: no layer slides."""
        return find_widest_window(self.config, list_layers(self._skeleton))

    def build_block(self, index: int) -> DecoderLayer:
        """Build decoder layer `index` of the model's own class, in eval mode, with parameters on the meta device.

        Its `layer_idx` is 0, because a walk gives each block a cache with a single layer. Experts are `RoutedExperts`.
        """
        block = as_decoder_layer(copy.deepcopy(self._skeleton.model.layers[index]))
        block.self_attn.layer_idx = 0
        if self.architecture.experts is not None:
            route_experts_(block, self.architecture.experts)
        return block.eval()

    def build_rotary_embedding(self) -> nn.Module:
        """Build the model's rotary embedding on the CPU. It has buffers only, which the meta device would lose."""
        return type(self._skeleton.model.rotary_emb)(self.config)

    def load_block_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of block `index`, named as inside the block (`self_attn.q_proj.weight`)."""
        return load_block_file(self.folder, self.architecture, index, self.stage)

    def load_tensor(self, name: str) -> torch.Tensor:
        """Return a tensor of the embeddings shard by its full name. The lm_head of a tied model is its embedding."""
        with open_tensors(self.folder / EMBEDDINGS, self.stage) as (file, _):
            if name == self.architecture.lm_head and self.config.tie_word_embeddings:
                name = self.architecture.embedding
            return file.get_tensor(name)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the input of block 0, [..., D] in the checkpoint's dtype, for token ids [...]."""
        return self.scale_embeddings(nn.functional.embedding(token_ids, self.load_tensor(self.architecture.embedding)))

    def scale_embeddings(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [..., D] of the embedding table in the checkpoint's dtype, times the factor of some families."""
        rows = rows.to(self.dtype)
        factor = getattr(self._skeleton.model.embed_tokens, "scalar_embed_scale", None)
        return rows if factor is None else rows * torch.tensor(factor).to(self.dtype)

    def build_embedding(self, weight: torch.Tensor) -> nn.Embedding:
        """Build the model's own embedding of a table [V, D], with its factor, which the checkpoint does not store."""
        embedding = copy.deepcopy(self._skeleton.model.embed_tokens)
        if hasattr(embedding, "scalar_embed_scale"):
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=weight.device)
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        return embedding

    def load_final_norm(self) -> Norm:
        """Return the final norm in the checkpoint's dtype."""
        norm = copy.deepcopy(self._skeleton.model.norm)
        weight = self.load_tensor(self.architecture.final_norm).to(self.dtype)
        norm.load_state_dict({"weight": weight}, assign=True)
        return norm.eval()

    @torch.no_grad()
    def apply_final_norm_(self, hidden: torch.Tensor) -> None:
        """Apply the final norm to hidden states [N, T, D] in place, window by window."""
        norm = self.load_final_norm()
        for window in hidden:
            window.copy_(norm(window))

    def load_lm_head(self) -> LmHead:
        """Return lm_head in the checkpoint's dtype. It has no bias in any supported family."""
        cap = find_logit_cap(self.config)
        quantized = self.load_quantized_head()
        if quantized is not None:
            return find_head(quantized, cap)
        return LmHead(self.load_tensor(self.architecture.lm_head).to(self.dtype), cap)

    def load_quantized_head(self) -> QuantizedHead | None:
        """Return the module of an lm_head in 8 bits; None: it is not quantized."""
        settings = self.settings.get(LM_HEAD)
        if settings is None:
            return None
        integers, scale = (self.load_tensor(name) for name in self.architecture.head_names(quantized=True))
        return QuantizedHead(integers, scale, settings["rotate"])

    def load_embeddings(self) -> dict[str, torch.Tensor]:
        """Return embedding, final norm and lm_head with its scales, as they are stored, by their full names."""
        architecture = self.architecture
        heads = architecture.head_names(LM_HEAD in self.settings)
        names = (architecture.embedding, architecture.final_norm, *heads)
        return {name: self.load_tensor(name) for name in names}


class CheckpointWriter:
    """Fills a folder that `Checkpoint` reads. Used inside `replacing_folder`, it never leaves half a checkpoint."""

    def __init__(self, folder: Path, architecture: Architecture, stage: str, header: Header | None = None) -> None:
        """Write into `folder`.

        Without a `header`, each shard has the fingerprint of its content. An imported model has no other identity.
        """
        self.folder = Path(folder)
        self.architecture = architecture
        self.stage = stage
        self.header = header
        self._index: dict[str, str] = {}
        self._shards: dict[str, str] = {}
        self._bytes = 0

    def write_block(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write the shard of block `index`. Names are those inside the block, or of transformers' own block."""
        prefix = self.architecture.tensor_prefix(index)
        tensors = stack_experts(tensors, self.architecture.interleaved_experts)
        self._write(BLOCK.format(index=index), {prefix + name: tensor for name, tensor in tensors.items()})

    def adopt_block(self, index: int, path: Path) -> None:
        """Take over a finished shard of block `index` (with full names) from elsewhere on this machine."""
        target = self.folder / BLOCK.format(index=index)
        try:
            os.link(path, target)
        except OSError:  # another file system, or one that has no hard links
            shutil.copyfile(path, target)
        with open_tensors(target, self.stage) as (file, header):
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._register(target.name, tensors, header)

    def write_embeddings(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write embedding, final norm and lm_head. Names are full names."""
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
        """Write the index, config.json and the folder's header. Non-empty `settings` go under `prefixquant`."""
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._index.items()))}
        write_json(self.folder / INDEX, index)
        write_json(self.folder / CONFIG, config | ({CONFIG_KEY: settings} if settings else {}))
        content = {"shards": self._shards, "config": config, "settings": settings}
        write_folder_header(self.folder, self.header or make_header(self.stage, content))


def save_block_file(
    folder: Path, architecture: Architecture, index: int, tensors: dict[str, torch.Tensor], header: Header
) -> None:
    """Write the shard of one block, for `CheckpointWriter.adopt_block`. Names are those inside the block."""
    prefix, stacked = architecture.tensor_prefix(index), stack_experts(tensors, architecture.interleaved_experts)
    save_tensors(folder / BLOCK.format(index=index), {prefix + name: t for name, t in stacked.items()}, header)


def load_block_file(folder: Path, architecture: Architecture, index: int, stage: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a block's shard, named as inside the block. Raises ArtifactError."""
    prefix = architecture.tensor_prefix(index)
    with open_tensors(folder / BLOCK.format(index=index), stage) as (file, _):
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return split_experts(tensors, architecture.interleaved_experts)


def build_skeleton(config: PreTrainedConfig) -> CausalModel:
    """Build the whole model of a config on the meta device: all modules and names, without memory."""
    with torch.device("meta"):
        return as_causal_model(
            AutoModelForCausalLM.from_config(config, attn_implementation=find_architecture(config).kernel)
        )


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files that make a checkpoint usable with its tensors: tokenizer, chat templates, generation config.

    Chat templates for special uses are in another folder. Files that a stage wrote about its work are left out.
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
