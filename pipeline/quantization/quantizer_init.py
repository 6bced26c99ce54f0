"""Initialise every quantizer of a rotated model, block by block, on what its quantized predecessors produce.

First, on some windows, walk the model in full precision to learn how much each channel counts (`sensitivity.py`). Then
for each block, on all calibration windows, its channels scaled by that (`equalization.py`):

1. run it in full precision and record what its quantizers will see (`statistics.py`);
2. choose the scale, zero point or clip factors of every quantizer and round the weights (`block_init.py`);
3. run it again, quantized, to get the next block's input, and count what falls beyond the static ranges
   (`inspection/saturation.py`).

The prefix is in the cache throughout, in full precision; its positions enter no statistic. A finished block is on disk
together with the hidden states behind it, so that a killed run continues at the first unfinished block and ends with
the same bytes.
"""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.blocks.prefetch import prefetch_blocks
from pipeline.blocks.prefix_kv import PREFIX
from pipeline.blocks.quantized import BlockSettings, block_settings, describe_blocks, fill_block
from pipeline.blocks.walk import BlockRunner
from pipeline.inspection.saturation import SATURATION, advance_probed_, summarise_saturation, write_saturation
from pipeline.models.checkpoint import BLOCK, REPORT, Checkpoint, CheckpointWriter, copy_companions, save_block_file
from pipeline.models.sites import site_group
from pipeline.numerics.quantizer import QuantizerSpec
from pipeline.quantization.block_init import SitePlan, choose_quantizers_, measure_block_error
from pipeline.quantization.equalization import EQUALIZATION, Equalizer, scale_prefix, select_block
from pipeline.quantization.params import QuantizerInitParams, find_group_size, site_params
from pipeline.quantization.sensitivity import measure_sensitivity
from pipeline.quantization.statistics import NumericalError, choose_rank_windows, record_block
from pipeline.rotation.matrices import compute_rotated_prefix_kv, load_rotation
from pipeline.runtime.artifacts import Header, load_tensors, load_unfinished, replacing_folder, save_tensors, write_json
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.runtime.unfinished import load_generation, save_generation
from pipeline.text.windows import pack_start_token, put_in_front

logger = logging.getLogger(__name__)

_CHANNELS = "channels-{rank:05d}.safetensors"
_SCALES = "equalization-{index:05d}.safetensors"
_TINY = 1e-30


def plan_block(
    init: QuantizerInitParams, checkpoint: Checkpoint, index: int
) -> tuple[BlockSettings, dict[str, SitePlan]]:
    """What block `index` is asked for: its settings, and how to choose the parameters of each quantized site.

    Args:
        init: as in params.yaml; overrides that name the block are applied.
        checkpoint: the rotated model, which says what online rotations it needs.
    """
    rotated = block_settings(checkpoint, index) or BlockSettings()
    sites = checkpoint.architecture.site_widths(checkpoint.build_block(index))
    plan = {site: site_params(init, site, index)[1] for site in sites}
    plan = {site: values for site, values in plan.items() if values["bits"] < 16}
    specs = {
        site: QuantizerSpec(
            values["bits"],
            values["symmetric"],
            find_group_size(site, values),
            values.get("mode", "static") == "dynamic",
            values["centered"],
            values["format"],
        )
        for site, values in plan.items()
    }
    return replace(rotated, key_before_rope=init.keys.before_rope, sites=specs), plan


def init_quantizers(
    checkpoint: Checkpoint,
    prefix: tuple[torch.Tensor, torch.Tensor],
    token_ids: torch.Tensor,
    init: QuantizerInitParams,
    runner: BlockRunner,
    work: Path,
    folder: Path,
    header: Header,
    ranks: Ranks = ALONE,
    start_token: int | None = None,
) -> dict[str, Any]:
    """From a rotated model to a quantized one.

    Args:
        checkpoint: the rotated model in full precision.
        prefix: token ids [P] and embeddings [P, D] in the original model's basis; P may be 0.
        token_ids: calibration windows [N, T], content alone.
        work: where finished blocks are kept until the end; an unfinished run with the same header is continued.
        folder: replaced by the quantized checkpoint at the end.
        header: of the artifact.
        ranks: each runs its own windows; choices are made from all of them, and the first rank writes.
        start_token: between this prefix and every text, or None; kept with the prefix. Quantized like any other token.

    Returns:
        The stage's metrics: the mean error of the blocks' outputs and of each kind of site, saturation, prefix length.
    """
    prefix_kv = compute_rotated_prefix_kv(checkpoint, prefix[1], runner)
    embedding_dtype = getattr(torch, init.embedding_dtype)
    own = put_in_front(token_ids[ranks.slice_windows(len(token_ids))], start_token)
    hidden = checkpoint.embed(own).to(embedding_dtype).to(checkpoint.dtype)
    report = init_blocks(checkpoint, hidden, prefix_kv, init, runner, work, header, ranks)
    kept_prefix = {"token_ids": prefix[0]} | ({} if prefix_kv is None else {"kv": prefix_kv})
    kept_prefix |= pack_start_token(start_token)
    if ranks.first:
        assemble_checkpoint(checkpoint, work, folder, init, kept_prefix, report, header)
        shutil.rmtree(work)
    ranks.wait()
    saturation = {block["block"]: block["saturation"] for block in report}
    return {"prefix_tokens": len(prefix[1])} | _summarise(report) | summarise_saturation({"calibration": saturation})


def init_blocks(
    checkpoint: Checkpoint,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    init: QuantizerInitParams,
    runner: BlockRunner,
    work: Path,
    header: Header,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Quantize all blocks into `work`, continuing there if an earlier run with the same header was cut short.

    Args:
        hidden: [N, T, D] embedded calibration windows, this rank's; overwritten.
        prefix_kv: [L, 2, kv_heads, P, d] or None.

    Returns:
        Per block: {"block": i, "block_error": of its output on the sampled windows, relative to what the block adds,
        "sites": {site: …} as `choose_quantizers_` returns, "saturation": {site: …} as `SaturationProbe.report`}.

    Raises:
        NumericalError: NaN or infinity in a block's activations.
    """
    work.mkdir(parents=True, exist_ok=True)
    channels = measure_channels(checkpoint, hidden, prefix_kv, init, runner, work, header, ranks)
    start, saved = load_generation(work, header, ranks)
    if start:
        hidden.copy_(saved["hidden"])
        logger.info("continuing at block %d of %d", start, checkpoint.block_count)

    def load(index: int) -> nn.Module:
        settings, _ = plan_block(init, checkpoint, index)
        return fill_block(checkpoint, index, checkpoint.load_block_tensors(index), settings)

    blocks = prefetch_blocks(load, range(start, checkpoint.block_count), runner.device)
    r2 = load_rotation(checkpoint.folder, "r2")
    for index in show_progress(range(start, checkpoint.block_count), checkpoint.block_count - start, "quantizing"):
        block = next(blocks)
        settings, plan = plan_block(init, checkpoint, index)
        equalizer = Equalizer(block, checkpoint.architecture, settings, r2, tuple(init.equalize))
        scales = equalizer.choose(channels[index])
        equalizer.scale_(scales)
        own_prefix = runner.take_prefix(prefix_kv, index)
        own_prefix = None if own_prefix is None else scale_prefix(own_prefix, scales, r2)
        report = _init_block_(checkpoint, index, block, plan, hidden, own_prefix, init, runner, ranks)
        tensors = block.state_dict()
        if ranks.first:
            if scales:
                save_tensors(work / _SCALES.format(index=index), scales, header)
            write_json(work / f"block-{index:05d}.json", {"block": index} | report)
            save_block_file(work, checkpoint.architecture, index, tensors, header)
        save_generation(work, {"hidden": hidden}, index + 1, header, ranks)
        del block, tensors
    return [_read_report(work / f"block-{index:05d}.json") for index in range(checkpoint.block_count)]


def measure_channels(
    checkpoint: Checkpoint,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    init: QuantizerInitParams,
    runner: BlockRunner,
    work: Path,
    header: Header,
    ranks: Ranks,
) -> list[dict[str, torch.Tensor]]:
    """`measure_sensitivity` of `mse_samples` of the windows [N, T, D] before block 0; once a run, kept in `work`."""
    if not init.equalize:
        return [{}] * checkpoint.block_count
    path = work / _CHANNELS.format(rank=ranks.rank)
    stored = load_unfinished(path, header)
    known = torch.tensor(int(stored is not None))
    ranks.min_(known)
    if not known:
        numbers = choose_rank_windows(ranks.count(len(hidden)), init.mse_samples, ranks)
        among_all = [number * ranks.world + ranks.rank for number in numbers]
        channels = measure_sensitivity(
            checkpoint,
            hidden[numbers],
            prefix_kv,
            sites=tuple(init.equalize),
            runner=runner,
            numbers=among_all,
            ranks=ranks,
        )
        stored = {f"{index}.{site}": sums for index, block in enumerate(channels) for site, sums in block.items()}
        save_tensors(path, stored, header)
    return [select_block(stored, index) for index in range(checkpoint.block_count)]


def _init_block_(
    checkpoint: Checkpoint,
    index: int,
    block: nn.Module,
    plan: dict[str, SitePlan],
    hidden: torch.Tensor,
    own_prefix: torch.Tensor | None,
    init: QuantizerInitParams,
    runner: BlockRunner,
    ranks: Ranks,
) -> dict[str, Any]:
    """Quantize one equalized block and move `hidden` behind it; its report."""
    architecture = checkpoint.architecture
    percentiles = frozenset(site for site, values in plan.items() if values["range"] == "percentile")
    try:
        statistics = record_block(
            block,
            architecture,
            hidden,
            own_prefix,
            runner=runner,
            mse_samples=init.mse_samples,
            percentile_sites=percentiles,
            ranks=ranks,
        )
        report = choose_quantizers_(block, architecture, statistics, own_prefix, plan, runner)
    except NumericalError as error:
        raise NumericalError(f"block {index}: {error}") from None
    ranks.broadcast_(*block.state_dict().values())  # all chose the same; to the last bit from here
    block_error = measure_block_error(block, statistics, own_prefix, runner) / max(statistics.energy, _TINY)
    saturation = advance_probed_(runner, block, architecture, hidden, own_prefix)
    if not all(torch.isfinite(window).all() for window in hidden):
        raise NumericalError(f"block {index}: its quantized output is not finite")
    return {"block_error": block_error, "sites": report, "saturation": saturation}


def assemble_checkpoint(
    checkpoint: Checkpoint,
    work: Path,
    folder: Path,
    init: QuantizerInitParams,
    prefix: dict[str, torch.Tensor],
    report: list[dict[str, Any]],
    header: Header,
) -> None:
    """Put the finished blocks of `work` and everything else a quantized checkpoint consists of into `folder`.

    Args:
        prefix: token_ids [P], and kv [L, 2, kv_heads, P, d] of the rotated model when P > 0, written as the blocks'
            own keys and values are scaled; start_token [1] where texts have one.
        report: of `init_blocks`.
    """
    architecture = checkpoint.architecture
    settings = [plan_block(init, checkpoint, index)[0] for index in range(checkpoint.block_count)]
    embedding_dtype = getattr(torch, init.embedding_dtype)
    with replacing_folder(folder) as partial:
        writer = CheckpointWriter(partial, architecture, header.stage, header)
        for index in range(checkpoint.block_count):
            writer.adopt_block(index, work / BLOCK.format(index=index))
        names = (architecture.embedding, architecture.lm_head)
        embeddings = {name: checkpoint.load_tensor(name).to(embedding_dtype) for name in names}
        embeddings[architecture.final_norm] = checkpoint.load_tensor(architecture.final_norm)
        writer.write_embeddings(embeddings)
        scales = {
            f"{index}.{site}": s
            for index in range(checkpoint.block_count)
            if (path := work / _SCALES.format(index=index)).is_file()
            for site, s in load_tensors(path, header.stage)[0].items()
        }
        if scales:
            save_tensors(partial / EQUALIZATION, scales, header)
        if "kv" in prefix:
            r2 = load_rotation(checkpoint.folder, "r2")
            blocks = enumerate(prefix["kv"])
            scaled = torch.stack([scale_prefix(kv, select_block(scales, index), r2) for index, kv in blocks])
            prefix = prefix | {"kv": scaled}
        save_tensors(partial / PREFIX, prefix, header)
        write_json(partial / REPORT, {"blocks": report})
        blocks = {block["block"]: block["saturation"] for block in report}
        write_saturation(partial / SATURATION, {"calibration": blocks})
        copy_companions(checkpoint.folder, partial)
        writer.finish(checkpoint.read_config(), describe_blocks(settings))


def _summarise(report: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over blocks, by kind of site with the seven linears as one; warns of optima on the edge of the grid."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for block in report:
        for site, values in block["sites"].items():
            kinds.setdefault("weights" if site_group(site) == "weights" else site, []).append(values)

    def mean(kind: str, key: str) -> float:
        return round(sum(values[key] for values in kinds[kind]) / len(kinds[kind]), 5)

    at_edge = sum(values["at_grid_edge"] for all_values in kinds.values() for values in all_values)
    if at_edge:
        logger.warning("%d clip factors lie on the low end of their grid; see report.json for the sites", at_edge)
    return {
        "block_error": round(sum(block["block_error"] for block in report) / len(report), 5),
        "relative_error": {kind: mean(kind, "relative_error") for kind in kinds},
        "at_grid_edge": at_edge,
    }


def _read_report(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
