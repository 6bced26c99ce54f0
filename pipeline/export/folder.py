"""The exported folder: packed integers, scales and the prefix, which `from_pretrained` loads.

    config.json               the model's config, with a complete `quantization_config`
    model-00001-of-….safetensors, model.safetensors.index.json
                              weight_packed, weight_scale, … of every block; embedding, lm_head, norms; prefix_kv
    tokenizer files           a tokenizer that begins texts like calibration windows: with a start token where the model
                              was trained with one, none where the prefix ends in it
    generation_config.json, README.md
    manifest.json             every file with its size and SHA-256, which `quantized_model.load` checks

All files are safetensors, JSON or text. Blocks are packed one by one, and each shard is written as soon as it is full.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.quantized import load_block, require_settings
from pipeline.export.model_card import write_model_card
from pipeline.export.source_facts import read_source_facts
from pipeline.inference.manifest import FORMAT_VERSION, METHOD, write_manifest
from pipeline.inference.packed_block import pack_block_
from pipeline.inference.transformers_quantizer import GUARDS
from pipeline.models.checkpoint import CONFIG, CONFIG_KEY, INDEX, LM_HEAD, Checkpoint, copy_companions
from pipeline.models.layers import find_linear
from pipeline.runtime.artifacts import Header, replacing_folder, save_tensors, write_folder_header, write_json
from pipeline.runtime.progress import show_progress
from pipeline.text.start_token import set_start_token_
from pipeline.text.windows import unpack_start_token

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_MIB = 2**20


def export_model(
    checkpoint: Checkpoint,
    prefix: dict[str, torch.Tensor],
    folder: Path,
    *,
    original: Path,
    max_shard_size: str,
    header: Header,
    results: dict[str, Any],
    samples: dict[str, list[dict[str, Any]]] | None = None,
    source: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `folder` and return the stage's metrics.

    Args:
        checkpoint: the quantized one.
        prefix: token_ids [P] (empty for a continuous prefix), kv [L, 2, kv_heads, P, d] when P > 0, and start_token [1]
            where a start token comes between the prefix and every text.
        folder: replaced as a whole.
        original: folder of the imported model, to compare sizes with.
        max_shard_size: such as 5GB; a single block or tensor may exceed it.
        results: variant -> the metrics of its evaluation, for the model card.
        samples: variant -> its continuations of some prompts, for the model card.
        source: the model's record by the stage `sources`, for license and base model in the card.

    Returns:
        Metrics of the safetensors files: `size_mib`, `original_mib`, `size_ratio` of the two, and `promised_ratio`: the
        size divided by the size that the bits of the weights promise, embedding and lm_head as they are stored.
    """
    kv = prefix.get("kv")
    token_ids = prefix["token_ids"].tolist()
    text_start_token_id = unpack_start_token(prefix)
    start_token_id = checkpoint.tokenizer.bos_token_id if kv is not None and text_start_token_id is None else None
    tokens = 0 if kv is None else kv.shape[-2]
    quantization = {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "blocks": {name: values for name, values in checkpoint.settings.items() if name != LM_HEAD},
        "prefix": {"tokens": tokens, "token_ids": token_ids, "start_token_id": start_token_id},
    }
    if text_start_token_id is not None:  # only then: versions that do not know the key refuse the folder
        quantization["text_start_token_id"] = text_start_token_id
    if LM_HEAD in checkpoint.settings:
        quantization[LM_HEAD] = checkpoint.settings[LM_HEAD]
    with replacing_folder(folder) as partial:
        sizes = write_shards(_packed_parts(checkpoint, kv), partial, parse_size(max_shard_size), header)
        copy_companions(checkpoint.folder, partial)
        save_tokenizer(checkpoint, partial, text_start_token_id)
        config = checkpoint.read_config()
        config.pop(CONFIG_KEY)
        config["tie_word_embeddings"] = checkpoint.architecture.lm_head not in sizes
        config |= {"quantization_config": quantization} | GUARDS
        write_json(partial / CONFIG, config)
        metrics = _measure(checkpoint, original, partial, sizes)
        write_model_card(
            partial,
            checkpoint,
            original=Checkpoint(original, "model"),
            facts=read_source_facts(source or {}, original),
            prefix=quantization["prefix"],
            sizes=metrics,
            samples=samples or {},
            results=results,
            text_start_token_id=text_start_token_id,
        )
        write_folder_header(partial, header)
        write_manifest(partial)
    return metrics


def parse_size(text: str) -> int:
    """Return the bytes of "5GB", "200MB" or "64KB": powers of 1,000, as transformers counts. Raise ValueError."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if match is None:
        raise ValueError(f"export.max_shard_size={text!r}: expected a whole number with KB, MB or GB, such as 5GB")
    return int(match[1]) * _UNITS[match[2]]


def save_tokenizer(checkpoint: Checkpoint, folder: Path, text_start_token_id: int | None) -> None:
    """Replace the tokenizer in `folder` by one that adds exactly this start token to texts, None: nothing.

    A tokenizer that does so already is left as it is.
    """
    tokenizer = copy.deepcopy(checkpoint.tokenizer)  # the checkpoint's own must not change: several folders are written
    if set_start_token_(tokenizer, text_start_token_id):
        tokenizer.save_pretrained(folder)


def write_shards(parts: Iterable[dict[str, torch.Tensor]], folder: Path, limit: int, header: Header) -> dict[str, int]:
    """Write tensors into shards with an index, and return name -> bytes.

    Args:
        parts: tensors under their full names. A part is never divided between shards.
        limit: bytes; a shard ends before a further part would exceed it.
    """
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    sizes: dict[str, int] = {}

    def flush() -> None:
        if shard:
            save_tensors(folder / f"shard-{len(shards)}", shard, header)
            shards.append(list(shard))
            shard.clear()

    for part in parts:
        part_sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in part.items()}
        if sum(sizes[name] for name in shard) + sum(part_sizes.values()) > limit:
            flush()
        shard |= part
        sizes |= part_sizes
    flush()
    file_names: dict[str, str] = {}
    for number, shard_names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        file_names |= dict.fromkeys(shard_names, file_name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(file_names.items()))}
    write_json(folder / INDEX, index)
    return sizes


def _packed_parts(checkpoint: Checkpoint, kv: torch.Tensor | None) -> Iterator[dict[str, torch.Tensor]]:
    """Yield tensors under their full names: embedding, norm, head and prefix, then block by block."""
    architecture = checkpoint.architecture
    rest = checkpoint.load_embeddings()
    embedding, lm_head = rest[architecture.embedding], rest[architecture.lm_head]
    if embedding.dtype == lm_head.dtype and torch.equal(embedding, lm_head):  # tied, and rotation left them equal
        rest.pop(architecture.lm_head)
    yield rest | ({} if kv is None else {"prefix_kv": kv.float()})
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "packing"):
        block = load_block(checkpoint, index)
        pack_block_(block, architecture)
        prefix = architecture.tensor_prefix(index)
        # Copies, because a view of the smallest tensor keeps the whole file of the block mapped.
        yield {prefix + name: tensor.clone() for name, tensor in block.state_dict().items()}


def _measure(checkpoint: Checkpoint, original: Path, folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    architecture = checkpoint.architecture
    promised = float(sizes[architecture.embedding] + sizes.get(architecture.lm_head, 0))
    for index in range(checkpoint.block_count):
        settings, skeleton = require_settings(checkpoint, index), checkpoint.build_block(index)
        for short, name in architecture.of_block(skeleton).linear_names.items():
            bits = settings.spec(short).bits if settings.spec(short).enabled else 8 * checkpoint.dtype.itemsize
            promised += find_linear(skeleton, name).weight.numel() * bits / 8
    size, original_size = (
        sum(path.stat().st_size for path in place.glob("*.safetensors")) for place in (folder, original)
    )
    return {
        "size_mib": round(size / _MIB, 2),
        "original_mib": round(original_size / _MIB, 2),
        "size_ratio": round(size / original_size, 4),
        "promised_ratio": round(size / promised, 4),
    }
