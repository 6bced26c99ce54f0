"""Initialise every quantizer of a rotated model, block by block, on what its quantized predecessors produce.

For each block, on all calibration windows:

1. run it in full precision and record, at every site, the true maximum over all tokens, a fixed subset of tokens for
   the searches, and the Gram matrix X^T X of what each group of linears reads;
2. choose the clip factor of every activation, key, value and weight quantizer (`scale_search.py`) and round the
   weights to nearest;
3. run it again, quantized, to get the next block's input.

The prefix is in the cache throughout, in full precision; its positions enter no statistic. A finished block is on disk
together with the hidden states behind it, so that a killed run continues at the first unfinished block and ends with
the same bytes.
"""

import functools
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.artifacts import ArtifactError, Header, load_tensors, replacing_folder, save_tensors, write_json
from pipeline.checkpoint import BLOCK, Checkpoint, CheckpointWriter, copy_companions
from pipeline.errors import PipelineError
from pipeline.gptq import round_gptq
from pipeline.hadamard import hadamard_transform
from pipeline.prefix import PREFIX
from pipeline.progress import show_progress
from pipeline.quantized_block import (
    BlockSettings,
    QuantizedLinear,
    block_settings,
    fill_block,
    find_site_quantizers,
    site_readers,
)
from pipeline.quantizer import StaticQuantizer, choose_scale, group_weight, quantize_weight
from pipeline.rotation import load_rotation
from pipeline.scale_search import ClipSearch, search_activation, search_keys, search_values, search_weight
from pipeline.walk import BlockRunner, batches, compute_prefix_kv

logger = logging.getLogger(__name__)

_HIDDEN = "hidden.safetensors"
_RECORDING = "prefixquant_recording"


class NumericalError(PipelineError):
    """A block produced NaN or infinite values; names the block and the place."""


def _record_queries(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    module.recorded_queries = query
    return sdpa_attention_forward(module, query, *args, **kwargs)


AttentionInterface.register(_RECORDING, _record_queries)
# Without a mask function of the same name transformers would pass no mask: attention would silently not be causal.
AttentionMaskInterface.register(_RECORDING, sdpa_mask)


@dataclass
class _SiteStatistics:
    """What is recorded of one site over all windows.

    Attributes:
        max_abs: true maximum, [] for activations, [kv_heads] for keys and values.
        samples: per batch; tokens [n, C] of activations, whole windows [B, heads, T, d] of keys and values.
        gram: sum over tokens of x^T x, [C, C] (activations only).
        tokens: how many tokens `gram` sums.
    """

    max_abs: torch.Tensor | None = None
    samples: list[torch.Tensor] = field(default_factory=list)
    gram: torch.Tensor | None = None
    tokens: int = 0

    def merge_max(self, max_abs: torch.Tensor) -> None:
        self.max_abs = max_abs if self.max_abs is None else torch.maximum(self.max_abs, max_abs)

    @property
    def sample(self) -> torch.Tensor:
        return torch.cat(self.samples)


@dataclass(frozen=True)
class InitSettings:
    """What `init_quantizers` is asked for, as in params.yaml.

    Attributes:
        weight_bits, weight_group_size, activation_bits, key_bits, value_bits: see `BlockSettings`.
        rounding: of the weights: `rtn` (to nearest) or `gptq`, with `damping` (see `gptq.py`).
        scale_search: `mse` or `minmax`.
        search_tokens: how many tokens, evenly spread over the windows, the searches look at (for keys and values
            whole windows, at least one).
        embedding_dtype: embedding and lm_head are rounded to it, once and for everything that follows.
    """

    weight_bits: int
    weight_group_size: int
    activation_bits: int
    key_bits: int
    value_bits: int
    rounding: str
    damping: float
    scale_search: str
    search_tokens: int
    embedding_dtype: torch.dtype

    def block_settings(self, rotated: BlockSettings) -> BlockSettings:
        """These bits, with the online rotations of the rotated model."""
        return replace(
            rotated,
            weight_bits=self.weight_bits,
            weight_group_size=self.weight_group_size,
            activation_bits=self.activation_bits,
            key_bits=self.key_bits,
            value_bits=self.value_bits,
        )


def init_quantizers(
    checkpoint: Checkpoint,
    prefix: tuple[torch.Tensor, torch.Tensor],
    token_ids: torch.Tensor,
    init: InitSettings,
    runner: BlockRunner,
    work: Path,
    folder: Path,
    header: Header,
) -> dict[str, Any]:
    """From a rotated model to a quantized one.

    Args:
        checkpoint: the rotated model in full precision.
        prefix: token ids [P] and embeddings [P, D] in the original model's basis; P may be 0.
        token_ids: calibration windows [N, T].
        work: where finished blocks are kept until the end; an unfinished run with the same header is continued.
        folder: replaced by the quantized checkpoint at the end.
        header: of the artifact.

    Returns:
        The stage's metrics: mean clip factor and relative error of each kind of site.
    """
    r1 = load_rotation(checkpoint.folder, "r1")
    rotated_prefix = r1.apply(prefix[1].to(torch.float64))
    prefix_kv = compute_prefix_kv(checkpoint, rotated_prefix, runner)
    settings = init.block_settings(block_settings(checkpoint))
    hidden = checkpoint.embed(token_ids).to(init.embedding_dtype).to(checkpoint.dtype)
    report = init_blocks(checkpoint, hidden, prefix_kv, settings, init, runner, work, header)
    kept_prefix = {"token_ids": prefix[0]} | ({} if prefix_kv is None else {"kv": prefix_kv})
    assemble_checkpoint(
        checkpoint, work, folder, settings, init.embedding_dtype, kept_prefix, {"blocks": report}, header
    )
    shutil.rmtree(work)
    return {"prefix_tokens": len(prefix[0])} | _summarise(report)


def init_blocks(
    checkpoint: Checkpoint,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    settings: BlockSettings,
    init: InitSettings,
    runner: BlockRunner,
    work: Path,
    header: Header,
) -> list[dict[str, Any]]:
    """Quantize all blocks into `work`, continuing there if an earlier run with the same header was cut short.

    Args:
        hidden: [N, T, D] embedded calibration windows; overwritten.
        prefix_kv: [L, 2, kv_heads, P, d] or None.

    Returns:
        Per block: {"block": i, "sites": {site: {"clip_factor", "relative_error", "at_grid_edge"}}}.

    Raises:
        NumericalError: NaN or infinity in a block's activations.
    """
    work.mkdir(parents=True, exist_ok=True)
    start = _resume(work, header, hidden)
    if start:
        logger.info("continuing at block %d of %d", start, checkpoint.block_count)
    for index in show_progress(range(start, checkpoint.block_count), checkpoint.block_count - start, "quantizing"):
        block_prefix = None if prefix_kv is None else prefix_kv[index]
        block = fill_block(checkpoint, index, checkpoint.load_block_tensors(index), settings, runner.device)
        statistics = _record(checkpoint, block, hidden, block_prefix, runner, init.search_tokens, index)
        report = _choose_scales_(checkpoint, block, statistics, block_prefix, settings, init)
        runner.advance_(block, hidden, block_prefix)
        if not torch.isfinite(hidden).all():
            raise NumericalError(f"block {index}: its quantized output is not finite")
        prefix = checkpoint.architecture.block_prefix.format(index=index)
        tensors = {prefix + name: tensor for name, tensor in block.state_dict().items()}
        write_json(work / f"block-{index:05d}.json", {"block": index, "sites": report})
        save_tensors(work / BLOCK.format(index=index), tensors, header)
        # Last, and with the number of finished blocks inside: whatever a kill leaves, this file is the truth.
        save_tensors(work / _HIDDEN, {"hidden": hidden, "finished": torch.tensor(index + 1)}, header)
    return [_read_report(work / f"block-{index:05d}.json") for index in range(checkpoint.block_count)]


def assemble_checkpoint(
    checkpoint: Checkpoint,
    work: Path,
    folder: Path,
    settings: BlockSettings,
    embedding_dtype: torch.dtype,
    prefix: dict[str, torch.Tensor],
    report: dict[str, Any],
    header: Header,
) -> None:
    """Put the finished blocks of `work` together with all else a quantized model consists of, as `folder`.

    Args:
        prefix: `token_ids` [P], and `kv` [L, 2, kv_heads, P, d] when P > 0.
    """
    architecture = checkpoint.architecture
    with replacing_folder(folder) as partial:
        writer = CheckpointWriter(partial, architecture, header.stage, header)
        for index in range(checkpoint.block_count):
            writer.adopt_block(index, work / BLOCK.format(index=index))
        names = (architecture.embedding, architecture.lm_head)
        embeddings = {name: checkpoint.load_tensor(name).to(embedding_dtype) for name in names}
        embeddings[architecture.final_norm] = checkpoint.load_tensor(architecture.final_norm)
        writer.write_embeddings(embeddings)
        save_tensors(partial / PREFIX, prefix, header)
        write_json(partial / "report.json", report)
        copy_companions(checkpoint.folder, partial)
        writer.finish(checkpoint.read_config(), {"block": settings.to_dict()})


def _resume(work: Path, header: Header, hidden: torch.Tensor) -> int:
    """Load the hidden states of an unfinished run of the same header into `hidden`; how many blocks it finished."""
    if not (work / _HIDDEN).is_file():
        return 0
    try:
        saved, found = load_tensors(work / _HIDDEN, header.stage)
    except ArtifactError as error:
        logger.warning("starting over: %s", error)
        return 0
    if found != header:
        logger.warning("starting over: the unfinished run in %s had other settings or inputs", work)
        return 0
    hidden.copy_(saved["hidden"])
    return int(saved["finished"])


def _summarise(report: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over blocks by kind of site, the seven linears as one: at most 15 numbers."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for block in report:
        for site, values in block["sites"].items():
            kinds.setdefault("weights" if site.endswith("_proj") else site, []).append(values)

    def mean(kind: str, key: str) -> float:
        return round(sum(values[key] for values in kinds[kind]) / len(kinds[kind]), 5)

    return {
        "clip_factor": {kind: mean(kind, "clip_factor") for kind in kinds},
        "relative_error": {kind: mean(kind, "relative_error") for kind in kinds},
        "at_grid_edge": sum(values["at_grid_edge"] for all_values in kinds.values() for values in all_values),
    }


def _read_report(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@torch.no_grad()
def _record(
    checkpoint: Checkpoint,
    block: nn.Module,
    hidden: torch.Tensor,
    prefix_kv: torch.Tensor | None,
    runner: BlockRunner,
    search_tokens: int,
    index: int,
) -> dict[str, _SiteStatistics]:
    """Run the block in full precision over all windows; `query` stands beside the six sites in the result."""
    windows, length, _ = hidden.shape
    stride = max(1, windows * length // search_tokens)
    whole = max(1, min(windows, search_tokens // length))
    chosen_windows = {round(place * (windows - 1) / max(1, whole - 1)) for place in range(whole)}
    statistics: dict[str, _SiteStatistics] = {}
    rows = slice(0, 0)

    def whole_windows(x: torch.Tensor) -> torch.Tensor:
        inside = [window - rows.start for window in sorted(chosen_windows) if rows.start <= window < rows.stop]
        return x[inside].float()

    def record_heads(site: str, x: torch.Tensor) -> None:
        statistics[site].merge_max(x.float().abs().amax(dim=(0, 2, 3)))
        statistics[site].samples.append(whole_windows(x))

    def record_tokens(site: str, x: torch.Tensor) -> None:
        tokens = x.flatten(0, -2).float()
        low, high = torch.aminmax(tokens)
        kept = statistics[site]
        kept.merge_max(torch.maximum(high, -low))
        # The subset is the same whatever the batch size: every stride-th token of all windows.
        first = -(rows.start * length) % stride
        kept.samples.append(tokens[first::stride].clone())
        gram = tokens.T @ tokens
        kept.gram = gram if kept.gram is None else kept.gram.add_(gram)
        kept.tokens += len(tokens)

    handles = []
    for site, quantizer in find_site_quantizers(block, checkpoint.architecture).items():
        statistics[site] = _SiteStatistics()
        record = record_heads if site in ("key", "value") else record_tokens
        handles.append(quantizer.register_forward_pre_hook(functools.partial(_call, record, site)))
    queries = statistics["query"] = _SiteStatistics()
    attention = block.self_attn
    attention.config._attn_implementation = _RECORDING
    for rows in batches(windows, runner.batch_size):
        runner.run(block, hidden[rows].to(runner.device), prefix_kv)
        queries.samples.append(whole_windows(attention.recorded_queries))
    attention.config._attn_implementation = "sdpa"
    del attention.recorded_queries
    for handle in handles:
        handle.remove()
    for site, kept in statistics.items():
        if kept.max_abs is not None and not torch.isfinite(kept.max_abs).all():
            raise NumericalError(f"block {index}: the activations at {site} are not finite")
    return statistics


def _call(record: Callable[[str, torch.Tensor], None], site: str, module: nn.Module, args: tuple[torch.Tensor]) -> None:
    record(site, args[0])


def _choose_scales_(
    checkpoint: Checkpoint,
    block: nn.Module,
    statistics: dict[str, _SiteStatistics],
    prefix_kv: torch.Tensor | None,
    settings: BlockSettings,
    init: InitSettings,
) -> dict[str, dict[str, Any]]:
    """Fix every scale of the block and round its weights; the clip factor and error of each, by site."""
    method = init.scale_search
    report: dict[str, dict[str, Any]] = {}
    quantizers = find_site_quantizers(block, checkpoint.architecture)

    def fix(site: str, quantizer: StaticQuantizer, max_abs: torch.Tensor, search: ClipSearch) -> None:
        quantizer.set_scale_(choose_scale(max_abs, quantizer.bits, search.factor.view(max_abs.shape)))
        report[site] = _describe(search)

    for site, readers in site_readers(checkpoint.architecture).items():
        if settings.activation_bits < 16:
            kept = statistics[site]
            weights = [block.get_submodule(name).weight for name in readers]
            search = search_activation(kept.sample, kept.max_abs, weights, settings.activation_bits, method)
            fix(site, quantizers[site], kept.max_abs, search)
    if settings.key_bits < 16:
        keys, queries = statistics["key"], statistics["query"].sample
        prefix_keys = None if prefix_kv is None else prefix_kv[0].to(queries)
        if settings.online_r3:
            queries = hadamard_transform(queries)
            prefix_keys = None if prefix_keys is None else hadamard_transform(prefix_keys)
        search = search_keys(
            queries, keys.sample, prefix_keys, keys.max_abs, block.self_attn.scaling, settings.key_bits, method
        )
        fix("key", quantizers["key"], keys.max_abs, search)
    if settings.value_bits < 16:
        values = statistics["value"]
        search = search_values(values.sample, values.max_abs, settings.value_bits, method)
        fix("value", quantizers["value"], values.max_abs, search)
    if settings.weight_bits < 16:
        for site, readers in site_readers(checkpoint.architecture).items():
            hessian = statistics[site].gram / statistics[site].tokens
            for name in readers:
                linear: QuantizedLinear = block.get_submodule(name)
                report[name] = _quantize_weight_(linear, hessian, settings, init)
    return report


def _quantize_weight_(
    linear: QuantizedLinear, hessian: torch.Tensor, settings: BlockSettings, init: InitSettings
) -> dict[str, Any]:
    """Choose the scales of a weight, round it, and measure the error of the layer's output that is left."""
    weight, bits = linear.weight.float(), settings.weight_bits
    search = search_weight(weight, hessian, bits, settings.weight_group_size, init.scale_search)
    max_abs = group_weight(weight, settings.weight_group_size).abs().amax(dim=-1)
    scale = choose_scale(max_abs, bits, search.factor.view(max_abs.shape))
    if init.rounding == "gptq":
        linear.set_integers_(round_gptq(weight, hessian, scale, bits, init.damping).integers, scale)
    else:
        linear.set_integers_(quantize_weight(weight, scale, bits), scale)
    change = linear.dense_weight(torch.float32) - weight
    error, energy = (((x @ hessian) * x).sum().item() for x in (change, weight))
    return _describe(search) | {"relative_error": error / energy if energy > 0 else 0.0}


def _describe(search: ClipSearch) -> dict[str, Any]:
    return {
        "clip_factor": search.factor.mean().item(),
        "relative_error": search.relative_error,
        "at_grid_edge": search.at_edge,
    }
