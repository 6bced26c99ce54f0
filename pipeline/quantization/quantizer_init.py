"""Initialise every quantizer of a rotated model, block by block, on the outputs of its quantized predecessors.

First, walk some windows through the full-precision model to measure how sensitive its predictions are to each channel
(`sensitivity.py`). Then, for each block and on all calibration windows:

1. scale its channels accordingly (`equalization.py`);
2. run it in full precision and record the values that its quantizers will quantize (`statistics.py`);
3. choose the scale, zero point or clip factors of every quantizer and round the weights (`block_init.py`);
4. run it again, quantized, to get the next block's input, and count the values beyond the static ranges
   (`inspection/saturation.py`).

The prefix is in the cache throughout, in full precision, and its positions enter no statistic. Each finished block is
written to disk together with the hidden states after it. A killed run therefore continues at the first unfinished block
and ends with the same bytes.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.prefetch import prefetch_blocks
from pipeline.blocks.quantized import BlockSettings, block_settings, fill_block
from pipeline.blocks.walk import BlockRunner
from pipeline.inspection.saturation import advance_probed_, summarise_saturation
from pipeline.models.architectures import UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint, save_block_file
from pipeline.models.layers import DecoderLayer
from pipeline.models.lm_head import quantize_head
from pipeline.models.sites import Site, base_site, site_group
from pipeline.numerics.quantizer import QuantizerSpec
from pipeline.quantization.assembly import UNROUNDED, assemble_checkpoint
from pipeline.quantization.block_init import choose_quantizers_, measure_block_error
from pipeline.quantization.equalization import EQUALIZATION, Equalizer, scale_prefix, select_block
from pipeline.quantization.equalization_check import check_equalization
from pipeline.quantization.expert_statistics import ExpertUse
from pipeline.quantization.params import QuantizerInitParams, SiteSettings, resolve_site
from pipeline.quantization.sensitivity import measure_sensitivity
from pipeline.quantization.statistics import NumericalError, choose_rank_windows, record_block
from pipeline.rotation.matrices import compute_rotated_prefix_kv, load_rotation
from pipeline.runtime.artifacts import Header, load_tensors, load_unfinished, save_tensors, write_json
from pipeline.runtime.progress import show_progress
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.runtime.unfinished import load_generation, save_generation
from pipeline.text.windows import pack_start_token, prepend_start_token

logger = logging.getLogger(__name__)

_CHANNELS = "channels-{rank:05d}.safetensors"
_SCALES = "equalization-{index:05d}.safetensors"
_REPORT = "block-{index:05d}.json"
_TINY = 1e-30
_NAMED_EXPERTS = 12  # in the metrics; report.json has all
BlockReport = dict[str, Any]  # see `init_blocks`


def resolve_settings(
    params: QuantizerInitParams, checkpoint: Checkpoint, index: int
) -> tuple[BlockSettings, dict[str, SiteSettings]]:
    """Return the settings of block `index`, and the settings of each quantized site and linear in it.

    Args:
        params: overrides that name the block are applied.
        checkpoint: the rotated model, which says which online rotations it needs.

    Raises:
        UnsupportedModelError: a setting is not supported for experts.
    """
    rotated = block_settings(checkpoint, index) or BlockSettings()
    widths = checkpoint.architecture.setting_widths([checkpoint.build_block(index)])
    resolved = {site: resolve_site(params, site, index) for site in map(base_site, widths)}
    if resolved[Site.MLP_HIDDEN].range == "percentile" and checkpoint.architecture.experts is not None:
        raise UnsupportedModelError(
            f"quantizer_init.activations.range='percentile': model_type={checkpoint.config.model_type!r} has experts, "
            "and percentiles are not counted in them. Use max, tensor, layer or block for mlp_hidden "
            "(quantizer_init.overrides)."
        )
    site_settings = {site: settings for site, settings in resolved.items() if settings.quantized}
    specs = {
        site: QuantizerSpec(
            bits=settings.bits,
            symmetric=settings.symmetric,
            group_size=settings.find_group_size(site_group(site)),
            dynamic=settings.dynamic,
            centered=settings.centered,
            format=settings.format,
        )
        for site, settings in site_settings.items()
    }
    return replace(rotated, key_before_rope=params.keys.before_rope, sites=specs), site_settings


def init_quantizers(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    params: QuantizerInitParams,
    prefix_token_ids: torch.Tensor,
    prefix_embeddings: torch.Tensor,
    token_ids: torch.Tensor,
    runner: BlockRunner,
    work_folder: Path,
    header: Header,
    ranks: Ranks = ALONE,
    text_start_token_id: int | None = None,
    bits: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Turn a rotated model into a quantized one.

    Args:
        checkpoint: the rotated model in full precision.
        folder: replaced by the quantized checkpoint at the end.
        prefix_token_ids, prefix_embeddings: [P], and [P, D] in the original model's basis; P may be 0.
        token_ids: calibration windows [N, T], content alone.
        work_folder: holds finished blocks until the end; an unfinished run with the same header is continued.
        header: the artifact's.
        ranks: each runs its own windows. Choices are made from all windows, and the first rank writes.
        text_start_token_id: put between this prefix and every text and kept with the prefix, or None. It is quantized
            like any other token.
        bits: how a budget was spent, for report.json.

    Returns:
        The stage's metrics: mean errors of the blocks' outputs and of each kind of site, saturation, prefix length.
    """
    prefix_kv = compute_rotated_prefix_kv(checkpoint, prefix_embeddings, runner)
    hidden = embed_windows(checkpoint, token_ids, params=params, ranks=ranks, text_start_token_id=text_start_token_id)
    report = init_blocks(
        checkpoint,
        hidden,
        prefix_kv,
        params=params,
        runner=runner,
        work_folder=work_folder,
        header=header,
        ranks=ranks,
    )
    prefix = {"token_ids": prefix_token_ids} | ({} if prefix_kv is None else {"kv": prefix_kv})
    prefix |= pack_start_token(text_start_token_id)
    if ranks.first:
        _write_checkpoint(
            checkpoint,
            folder,
            params=params,
            prefix=prefix,
            report={"blocks": report} | ({"bits": bits} if bits else {}),
            work_folder=work_folder,
            header=header,
        )
        shutil.rmtree(work_folder)
    ranks.wait()
    saturation = {block["block"]: block["saturation"] for block in report}
    metrics = {"prefix_tokens": len(prefix_embeddings)} | summarise_blocks(report)
    return metrics | summarise_saturation({"calibration": saturation})


def embed_windows(
    checkpoint: Checkpoint,
    token_ids: torch.Tensor,
    *,
    params: QuantizerInitParams,
    ranks: Ranks,
    text_start_token_id: int | None,
) -> torch.Tensor:
    """Return this rank's calibration windows [n, T, D] before block 0, from all windows' token ids [N, T].

    Embeddings are rounded as they are stored, and the text start token comes before each window.
    """
    rank_windows = prepend_start_token(token_ids[ranks.slice_windows(len(token_ids))], text_start_token_id)
    return checkpoint.embed(rank_windows).to(getattr(torch, params.embedding_dtype)).to(checkpoint.dtype)


def init_blocks(
    checkpoint: Checkpoint,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    *,
    params: QuantizerInitParams,
    runner: BlockRunner,
    work_folder: Path,
    header: Header,
    ranks: Ranks = ALONE,
    channels: list[dict[str, torch.Tensor]] | None = None,
) -> list[BlockReport]:
    """Quantize all blocks into `work_folder`, and continue there if a run with the same header was cut short.

    Args:
        hidden: [N, T, D] embedded calibration windows, this rank's; overwritten.
        prefix_kv: [L, 2, kv_heads, P, d] or None.
        channels: the result of `measure_channels`; None: it is measured.

    Returns:
        For each block: {"block": its index, "block_error": the error of its output on the sampled windows, relative to
        the change that it makes to its input, "sites": see `choose_quantizers_`, "saturation": see
        `SaturationProbe.report`}. Blocks with experts have "experts": see `describe_uses`.

    Raises:
        NumericalError: a block's activations are NaN or infinite.
        EqualizationError: scaling the channels of a block changes its output.
    """
    work_folder.mkdir(parents=True, exist_ok=True)
    if channels is None:
        channels = measure_channels(
            checkpoint,
            hidden,
            prefix_kv,
            params=params,
            runner=runner,
            work_folder=work_folder,
            header=header,
            ranks=ranks,
        )
    start, saved = load_generation(work_folder, header, ranks)
    if start:
        hidden.copy_(saved["hidden"])
        logger.info("continuing at block %d of %d", start, checkpoint.block_count)

    def load(index: int) -> DecoderLayer:
        settings, _ = resolve_settings(params, checkpoint, index)
        return fill_block(checkpoint, index, checkpoint.load_block_tensors(index), settings)

    indices = range(start, checkpoint.block_count)
    blocks = prefetch_blocks(load, indices, runner.device)
    r2 = load_rotation(checkpoint.folder, "r2")
    exact_runner = BlockRunner(checkpoint, runner.device, 1)  # masks and tables are kept in one dtype
    for index in show_progress(indices, len(indices), "quantizing"):
        block = next(blocks)
        settings, site_settings = resolve_settings(params, checkpoint, index)
        equalizer = Equalizer(block, checkpoint.architecture, settings, r2, tuple(params.equalize))
        scales = equalizer.choose(channels[index], runner)
        equalizer.scale_(scales)
        block_prefix = runner.take_prefix(prefix_kv, index)
        check_equalization(
            checkpoint,
            index,
            scales,
            settings=settings,
            r2=r2,
            hidden=hidden,
            prefix_kv=block_prefix,
            runner=exact_runner,
        )
        offsets: dict[str, torch.Tensor] | None = {} if params.keep_unrounded else None
        report = _init_block_(
            checkpoint,
            index,
            block,
            hidden,
            prefix_kv=None if block_prefix is None else scale_prefix(block_prefix, scales, r2),
            params=params,
            site_settings=site_settings,
            runner=runner,
            ranks=ranks,
            offsets=offsets,
        )
        tensors = block.state_dict()
        if ranks.first:
            if offsets:
                save_tensors(work_folder / UNROUNDED.format(index=index), offsets, header)
            if scales:
                save_tensors(work_folder / _SCALES.format(index=index), scales, header)
            write_json(work_folder / _REPORT.format(index=index), {"block": index} | report)
            save_block_file(work_folder, checkpoint.architecture, index, tensors, header)
        save_generation(work_folder, {"hidden": hidden}, index + 1, header, ranks)
        del block, tensors
    return [_read_report(work_folder / _REPORT.format(index=index)) for index in range(checkpoint.block_count)]


def measure_channels(
    checkpoint: Checkpoint,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    *,
    params: QuantizerInitParams,
    runner: BlockRunner,
    work_folder: Path,
    header: Header,
    ranks: Ranks,
) -> list[dict[str, torch.Tensor]]:
    """Run `measure_sensitivity` on `mse_samples` of the windows [N, T, D] before block 0, once per run.

    The result is kept in `work_folder`. If nothing is to be equalized, it is an empty dict for each block.
    """
    if not params.equalize:
        return [{}] * checkpoint.block_count
    path = work_folder / _CHANNELS.format(rank=ranks.rank)
    stored = load_unfinished(path, header)
    all_stored = torch.tensor(int(stored is not None))
    ranks.min_(all_stored)
    if not all_stored:
        windows = choose_rank_windows(ranks.count(len(hidden)), params.mse_samples, ranks)
        channels = measure_sensitivity(
            checkpoint,
            hidden[windows],
            prefix_kv,
            sites=tuple(params.equalize),
            runner=runner,
            numbers=[window * ranks.world + ranks.rank for window in windows],
            ranks=ranks,
        )
        stored = {f"{index}.{site}": sums for index, block in enumerate(channels) for site, sums in block.items()}
        save_tensors(path, stored, header)
    assert stored is not None, "a rank measures anew unless all ranks have stored channels"
    return [select_block(stored, index) for index in range(checkpoint.block_count)]


def _init_block_(
    checkpoint: Checkpoint,
    index: int,
    block: DecoderLayer,
    hidden: torch.Tensor,
    *,
    prefix_kv: torch.Tensor | None,
    params: QuantizerInitParams,
    site_settings: dict[str, SiteSettings],
    runner: BlockRunner,
    ranks: Ranks,
    offsets: dict[str, torch.Tensor] | None,
) -> BlockReport:
    """Quantize one equalized block, move `hidden` through it, and return its report."""
    architecture = checkpoint.architecture
    try:
        statistics = record_block(
            block,
            architecture,
            hidden,
            prefix_kv,
            runner=runner,
            mse_samples=params.mse_samples,
            percentile_sites=find_percentile_sites(site_settings),
            ranks=ranks,
        )
        sites = choose_quantizers_(
            block,
            architecture,
            statistics,
            prefix_kv=prefix_kv,
            site_settings=site_settings,
            runner=runner,
            offsets=offsets,
        )
    except NumericalError as error:
        raise NumericalError(f"block {index}: {error}") from None
    ranks.broadcast_(*block.state_dict().values())  # all ranks chose the same; now they agree to the last bit
    block_error = measure_block_error(block, statistics, prefix_kv, runner) / max(statistics.energy, _TINY)
    saturation = advance_probed_(runner, block, architecture, hidden, prefix_kv)
    if not all(torch.isfinite(window).all() for window in hidden):
        raise NumericalError(
            f"block {index}: its quantized output is not finite. Use more bits for this block "
            "(quantizer_init.overrides)."
        )
    report = {"block_error": block_error, "sites": sites, "saturation": saturation}
    return report | ({"experts": describe_uses(index, statistics.uses)} if statistics.uses else {})


def describe_uses(index: int, uses: Sequence[ExpertUse]) -> dict[str, Any]:
    """Return the part of the report about the experts of block `index`, and log a warning that names starved ones.

    Returns:
        "tokens": tokens of each expert; "starved": for each expert with few tokens, its number and the tokens that its
        statistics were topped up with.
    """
    starved = [{"expert": number, **asdict(use)} for number, use in enumerate(uses) if use.added]
    if starved:
        names = ", ".join(f"{row['expert']} ({row['tokens']} + {row['added']})" for row in starved)
        logger.warning("block %d: experts with few tokens, topped up with the next best ones: %s", index, names)
    return {"tokens": [use.tokens for use in uses], "starved": starved}


def find_percentile_sites(site_settings: dict[str, SiteSettings]) -> frozenset[str]:
    """Return the sites whose range is read from a histogram."""
    return frozenset(site for site, settings in site_settings.items() if settings.range == "percentile")


def _write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    params: QuantizerInitParams,
    prefix: dict[str, torch.Tensor],
    report: dict[str, Any],
    work_folder: Path,
    header: Header,
) -> None:
    """Write the quantized checkpoint to `folder`.

    Args:
        prefix: token_ids [P], start_token [1] if texts have one, and kv [L, 2, kv_heads, P, d] of the rotated model if
            P > 0. The KV is written scaled like the keys and values of each block.
        report: for report.json; its blocks are from `init_blocks`.
    """
    architecture, indices = checkpoint.architecture, range(checkpoint.block_count)
    scales: dict[str, torch.Tensor] = {}
    for index in indices:
        path = work_folder / _SCALES.format(index=index)
        if path.is_file():
            tensors, _ = load_tensors(path, header.stage)
            scales |= {f"{index}.{site}": s for site, s in tensors.items()}
    if "kv" in prefix:
        r2 = load_rotation(checkpoint.folder, "r2")
        scaled = [scale_prefix(kv, select_block(scales, index), r2) for index, kv in enumerate(prefix["kv"])]
        prefix = prefix | {"kv": torch.stack(scaled)}
    embedding_dtype = getattr(torch, params.embedding_dtype)
    embeddings = checkpoint.load_embeddings()
    for name in (architecture.embedding, architecture.lm_head):
        embeddings[name] = embeddings[name].to(embedding_dtype)
    lm_head: dict[str, Any] | None = None
    if params.lm_head_bits < 16:
        lm_head = {"bits": params.lm_head_bits, "rotate": load_rotation(checkpoint.folder, "r1").is_identity}
        rounded = quantize_head(checkpoint.load_tensor(architecture.lm_head), lm_head["rotate"])
        embeddings |= dict(zip(architecture.head_names(quantized=True), rounded, strict=True))

    def write_scales(unfinished: Path) -> None:
        if scales:
            save_tensors(unfinished / EQUALIZATION, scales, header)
        for index in indices if params.keep_unrounded else ():
            shutil.copyfile(work_folder / UNROUNDED.format(index=index), unfinished / UNROUNDED.format(index=index))

    assemble_checkpoint(
        checkpoint,
        folder,
        work_folder=work_folder,
        settings=[resolve_settings(params, checkpoint, index)[0] for index in indices],
        embeddings=embeddings,
        lm_head=lm_head,
        prefix=prefix,
        report=report,
        header=header,
        write_extras=write_scales,
    )


def summarise_blocks(report: list[BlockReport]) -> dict[str, Any]:
    """Average errors over blocks by kind of site, all linears being one kind; warn of optima at the grid's edge."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for block in report:
        for site, values in block["sites"].items():
            kinds.setdefault("weights" if site_group(site) == "weights" else base_site(site), []).append(values)

    def average(kind: str, key: str) -> float:
        return round(sum(values[key] for values in kinds[kind]) / len(kinds[kind]), 5)

    starved = [
        f"{index}.experts.{row['expert']}"
        for index, block in enumerate(report)
        for row in block.get("experts", {}).get("starved", [])
    ]
    sparse: dict[str, Any] = {}
    if any("experts" in block for block in report):
        sparse = {"starved_experts": len(starved), "starved_expert_names": starved[:_NAMED_EXPERTS]}
    at_edge = sum(values["at_grid_edge"] for all_values in kinds.values() for values in all_values)
    if at_edge:
        logger.warning("%d clip factors lie on the low end of their grid; see report.json for the sites", at_edge)
    return {
        "block_error": round(sum(block["block_error"] for block in report) / len(report), 5),
        "relative_error": {kind: average(kind, "relative_error") for kind in kinds},
        "at_grid_edge": at_edge,
        **sparse,
    }


def _read_report(path: Path) -> BlockReport:
    return json.loads(path.read_text(encoding="utf-8"))
