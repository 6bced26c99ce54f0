"""Memory and disk of `export`."""

from collections.abc import Collection

from pipeline.blocks.quantized import BlockSettings, block_settings
from pipeline.export.folder import parse_size
from pipeline.export.params import ExportParams
from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.disk import OtherFiles, count_blocks
from pipeline.planning.need import Need, make_need
from pipeline.planning.sizes import Sizes

_GGUF_BYTES = {4: 18 / 32, 8: 34 / 32}  # per weight in blocks of 32: Q4_0 and Q8_0


def plan_export(checkpoint: Checkpoint, other_files: OtherFiles, params: ExportParams) -> Need:
    """Plan the export: a shard, which holds embedding and lm_head whole, and a block of integers.

    Args:
        checkpoint: the quantized model.
        other_files: bytes of its files besides the blocks.
    """
    sizes = Sizes.of(checkpoint)
    tables = 2 * sizes.table_entries * 2  # in bfloat16
    packed = sizes.blocks * sizes.weights // 2 + tables  # weights of 4 bits
    shard = min(packed, max(parse_size(params.max_shard_size), tables))
    compute = shard + sizes.weights
    if "onnx" in params.formats:  # the exporter holds the whole model: integers in bytes, tables in float32
        compute = max(compute, sizes.blocks * sizes.weights + 2 * sizes.table_entries * 4)
    artifact = _count_folders(checkpoint, other_files, params.formats)
    return make_need(on_gpu=False, compute=compute, artifact=artifact)


def _count_folders(checkpoint: Checkpoint, other_files: OtherFiles, formats: Collection[str]) -> float:
    """Return the bytes of the exported folder and of the folders in other formats."""
    packed = count_blocks(checkpoint, lambda index: block_settings(checkpoint, index), packed=True).total
    prefix = other_files.prefix * 4 / checkpoint.dtype.itemsize  # exported in float32
    total = packed + other_files.distinct_tables + prefix + other_files.companions
    if "compressed-tensors" in formats:  # the same integers; embedding and lm_head apart
        total += packed + other_files.tables + other_files.companions
    if "peft" in formats:
        total += prefix
    if "onnx" in formats:  # tables in float32, the prefix twice
        total += packed + 2 * other_files.tables + 2 * prefix + other_files.companions
    if "gguf" in formats:
        total += _count_gguf_blocks(checkpoint) + other_files.tables + other_files.companions
    return total


def _count_gguf_blocks(checkpoint: Checkpoint) -> float:
    total = 0.0
    for index in range(checkpoint.block_count):
        settings = block_settings(checkpoint, index) or BlockSettings()
        block = checkpoint.build_block(index)
        for site, name in checkpoint.architecture.of_block(block).linear_names.items():
            spec, weights = settings.spec(site), block.get_parameter(f"{name}.weight").numel()
            per_weight = _GGUF_BYTES[4 if spec.bits <= 4 else 8] if spec.enabled else checkpoint.dtype.itemsize
            total += weights * per_weight
    return total
