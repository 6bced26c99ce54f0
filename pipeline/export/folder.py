"""The deliverable: packed integers, scales and the prefix in a folder that `from_pretrained` loads.

    config.json               the model's, with a complete `quantization_config`
    model-00001-of-….safetensors, model.safetensors.index.json
                              weight_packed, weight_scale, … of every block; embedding, lm_head, norms; prefix_kv
    tokenizer files           of a tokenizer that puts in front of texts what calibration had there: a start token where
                              the model was trained with one, none behind a prefix that has it
    generation_config.json, README.md
    manifest.json             every file with its size and SHA-256; what `quantized_model.load` checks

safetensors and JSON only. Blocks are packed one by one and written as soon as a shard is full.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.quantized import block_settings, load_block
from pipeline.export.model_card import write_model_card
from pipeline.inference.manifest import FORMAT_VERSION, METHOD, write_manifest
from pipeline.inference.packed_block import pack_block_
from pipeline.inference.transformers_quantizer import GUARDS
from pipeline.models.checkpoint import CONFIG, CONFIG_KEY, INDEX, Checkpoint, copy_companions
from pipeline.runtime.artifacts import Header, replacing_folder, save_tensors, write_folder_header, write_json
from pipeline.runtime.progress import show_progress
from pipeline.text.start_token import set_start_token_
from pipeline.text.windows import unpack_start_token

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_MIB = 2**20


def export_model(
    checkpoint: Checkpoint,
    prefix: dict[str, torch.Tensor],
    original: Path,
    folder: Path,
    max_shard_size: str,
    header: Header,
    results: dict[str, Any],
) -> dict[str, Any]:
    """Write `folder`.

    Args:
        checkpoint: the quantized one.
        original: folder of the imported model, to compare sizes with.
        prefix: token_ids [P] (none of a continuous prefix), kv [L, 2, kv_heads, P, d] when P > 0, and start_token [1]
            where one stands in front of every text.
        max_shard_size: such as 5GB; a single block or tensor may exceed it.
        results: variant -> what its evaluation wrote, for the model card.

    Returns:
        The stage's metrics, of safetensors files: `size_mib`, `original_mib`, their ratio, and `promised_ratio`: the
        size over what the bits of weights, and embedding and lm_head as they are, come to.
    """
    kv = prefix.get("kv")
    token_ids = prefix["token_ids"].tolist()
    text_start = unpack_start_token(prefix)
    start = checkpoint.tokenizer.bos_token_id if kv is not None and text_start is None else None
    quantization = {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "blocks": checkpoint.settings,
        "prefix": {"tokens": 0 if kv is None else kv.shape[-2], "token_ids": token_ids, "start_token_id": start},
    }
    if text_start is not None:  # so that who cannot heed it refuses the folder
        quantization["text_start_token_id"] = text_start
    with replacing_folder(folder) as partial:
        sizes = write_shards(_packed_parts(checkpoint, kv), partial, parse_size(max_shard_size), header)
        copy_companions(checkpoint.folder, partial)
        save_tokenizer(checkpoint, partial, text_start)
        config = checkpoint.read_config()
        config.pop(CONFIG_KEY)
        config["tie_word_embeddings"] = checkpoint.architecture.lm_head not in sizes
        config |= {"quantization_config": quantization} | GUARDS
        write_json(partial / CONFIG, config)
        metrics = _measure(checkpoint, original, partial, sizes)
        write_model_card(partial, checkpoint, quantization["prefix"], metrics, results, text_start)
        write_folder_header(partial, header)
        write_manifest(partial)
    return metrics


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB", "64KB" (powers of 1,000, as transformers counts). Raises ValueError."""
    found = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if found is None:
        raise ValueError(f"{text!r} is no size; write 5GB, 200MB or 64KB")
    return int(found[1]) * _UNITS[found[2]]


def save_tokenizer(checkpoint: Checkpoint, folder: Path, start_token: int | None) -> None:
    """Replace the tokenizer in `folder`, unless it puts just this in front of texts by itself, by one that does."""
    tokenizer = copy.deepcopy(checkpoint.tokenizer)  # the checkpoint's stays as it is: several folders are written
    if set_start_token_(tokenizer, start_token):
        tokenizer.save_pretrained(folder)


def write_shards(parts: Iterable[dict[str, torch.Tensor]], folder: Path, limit: int, header: Header) -> dict[str, int]:
    """Write tensors, given part by part with their full names, and their index; name -> bytes.

    A shard ends before it would exceed `limit` bytes; a part is never divided.
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
        new = {name: tensor.numel() * tensor.element_size() for name, tensor in part.items()}
        if sum(sizes[name] for name in shard) + sum(new.values()) > limit:
            flush()
        shard |= part
        sizes |= new
    flush()
    names = {}
    for number, own in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        names |= dict.fromkeys(own, file_name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(names.items()))}
    write_json(folder / INDEX, index)
    return sizes


def _packed_parts(checkpoint: Checkpoint, kv: torch.Tensor | None) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors with their full names: embedding, norm, head and prefix, then block by block."""
    architecture = checkpoint.architecture
    names = (architecture.embedding, architecture.final_norm, architecture.lm_head)
    rest = {name: checkpoint.load_tensor(name) for name in names}
    if torch.equal(rest[architecture.embedding], rest[architecture.lm_head]):  # tied, and nothing has set them apart
        rest.pop(architecture.lm_head)
    yield rest | ({} if kv is None else {"prefix_kv": kv.float()})
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "packing"):
        block = load_block(checkpoint, index)
        pack_block_(block, architecture)
        prefix = architecture.tensor_prefix(index)
        # Copies: a view of the smallest tensor would keep the whole block's file in memory.
        yield {prefix + name: tensor.clone() for name, tensor in block.state_dict().items()}


def _measure(checkpoint: Checkpoint, original: Path, folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    architecture = checkpoint.architecture
    promised = float(sizes[architecture.embedding] + sizes.get(architecture.lm_head, 0))
    skeleton = checkpoint.build_block(0)
    for index in range(checkpoint.block_count):
        settings = block_settings(checkpoint, index)
        for short, name in architecture.linear_sites.items():
            bits = settings.spec(short).bits if settings.spec(short).enabled else 8 * checkpoint.dtype.itemsize
            promised += skeleton.get_submodule(name).weight.numel() * bits / 8
    size, before = (sum(path.stat().st_size for path in own.glob("*.safetensors")) for own in (folder, original))
    return {
        "size_mib": round(size / _MIB, 2),
        "original_mib": round(before / _MIB, 2),
        "size_ratio": round(size / before, 4),
        "promised_ratio": round(size / promised, 4),
    }
