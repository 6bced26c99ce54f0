"""Assemble a quantized checkpoint from finished blocks, as the stages quantizer_init and finetuning end."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.prefix_kv import PREFIX
from pipeline.blocks.quantized import BlockSettings, describe_blocks
from pipeline.inspection.saturation import SATURATION, write_saturation
from pipeline.models.checkpoint import BLOCK, LM_HEAD, REPORT, Checkpoint, CheckpointWriter, copy_companions
from pipeline.runtime.artifacts import Header, replacing_folder, save_tensors, write_json

UNROUNDED = "unrounded-{index:05d}.safetensors"  # of a block: for each linear, `gptq.measure_offsets`


def assemble_checkpoint(
    source: Checkpoint,
    folder: Path,
    *,
    work_folder: Path,
    settings: Sequence[BlockSettings],
    embeddings: dict[str, torch.Tensor],
    lm_head: dict[str, Any] | None = None,
    prefix: dict[str, torch.Tensor],
    report: dict[str, Any],
    header: Header,
    write_extras: Callable[[Path], None] | None = None,
) -> None:
    """Put finished blocks and everything else that a quantized checkpoint consists of into `folder`.

    Args:
        source: the checkpoint whose config, tokenizer and other companions are taken over.
        folder: replaced as a whole.
        work_folder: holds the finished blocks.
        settings: settings of every block, for config.json.
        embeddings: embedding, final norm, and lm_head with its scales, by their full names.
        lm_head: the settings of a quantized lm_head, or None.
        prefix: token_ids [P], and kv [L, 2, kv_heads, P, d] if P > 0; start_token [1] if texts have one.
        report: for report.json: {"blocks": [{"block", "saturation", …}, …], …}.
        write_extras: called with the unfinished folder, to add the files of one stage alone.
    """
    with replacing_folder(folder) as partial:
        writer = CheckpointWriter(partial, source.architecture, header.stage, header)
        for index in range(source.block_count):
            writer.adopt_block(index, work_folder / BLOCK.format(index=index))
        writer.write_embeddings(embeddings)
        save_tensors(partial / PREFIX, prefix, header)
        write_json(partial / REPORT, report)
        saturation = {block["block"]: block["saturation"] for block in report["blocks"]}
        write_saturation(partial / SATURATION, {"calibration": saturation})
        if write_extras is not None:
            write_extras(partial)
        copy_companions(source.folder, partial)
        described = describe_blocks(settings) | ({} if lm_head is None else {LM_HEAD: lm_head})
        writer.finish(source.read_config(), described)
