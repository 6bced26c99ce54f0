"""Choose the scales, zero points and clip factors of every quantizer of one block, and round its weights.

Quantizers are taken in the order data flows through the block, activations first. Each is judged with the statistics of
the block in full precision (`scale_search.py`), except for the objective `block`: there the block is run with the
quantizers chosen so far in place, for every factor tried, and its output compared with the full-precision one.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # the same in every supported family

from pipeline.blocks.quantized import QuantizedLinear, find_site_quantizers
from pipeline.blocks.walk import BlockRunner, batches
from pipeline.models.architectures import Architecture, find_sliding_window
from pipeline.models.sites import Site
from pipeline.numerics.gptq import InverseFactor, factor_inverse, round_gptq
from pipeline.numerics.quantizer import dequantize_weight, group, measure_range, quantize_weight
from pipeline.quantization.scale_search import (
    Candidate,
    ClipSearch,
    ErrorOf,
    activation_error,
    attention_error,
    attention_output_error,
    keep_range,
    product_dtype,
    search_factors,
    tensor_error,
    weight_error,
)
from pipeline.quantization.statistics import BlockStatistics

_COLUMNS = 2048  # of a weight whose product with a Gram matrix is in memory
_MANY = 2**16  # values, over which a sum of errors is smooth
_ROWS = 1024  # of a weight, evenly spread, on which the error is reported; up to twice as many are all taken
SitePlan = dict[str, Any]  # the values of a site's params: bits, range, rounding, …


@torch.no_grad()
def choose_quantizers_(
    block: nn.Module,
    architecture: Architecture,
    statistics: BlockStatistics,
    prefix_kv: torch.Tensor | None,
    plan: dict[str, SitePlan],
    runner: BlockRunner,
) -> dict[str, dict[str, Any]]:
    """Calibrate every quantizer of `block` in place and replace its weights by integers.

    Args:
        block: as it was recorded, not calibrated.
        plan: site -> its values as in params.yaml, overrides applied.

    Returns:
        Site -> {"clip_factor", "relative_error", "at_grid_edge"} (weights also "damping", where GPTQ took it): the
        mean factor, the error relative to the signal in the objective of the site (weights: in the layer's outputs, of
        large ones on a part of them), how many optima lie on the grid's end.
    """
    chooser = _Chooser(block, architecture, statistics, prefix_kv, plan, runner)
    report = {}
    for site, quantizer in chooser.quantizers.items():
        if quantizer.spec.enabled:
            report[site] = chooser.calibrate_(site)
    for site, readers in chooser.readers.items():
        for name in readers:
            if block.get_submodule(name).spec.enabled:
                report[name.rpartition(".")[2]] = chooser.quantize_weight_(name, site)
        chooser.forget_(site)
    return report


@dataclass
class _Chooser:
    """What `choose_quantizers_` was given, and what several of its choices share."""

    block: nn.Module
    architecture: Architecture
    statistics: BlockStatistics
    prefix_kv: torch.Tensor | None
    plan: dict[str, SitePlan]
    runner: BlockRunner

    def __post_init__(self) -> None:
        self.readers = self.architecture.site_readers
        self.quantizers = find_site_quantizers(self.block, self.architecture)
        self._hessians: dict[tuple[str, bool], torch.Tensor] = {}
        self._factors: dict[tuple[str, bool], InverseFactor] = {}

    def calibrate_(self, site: str) -> dict[str, Any]:
        quantizer, plan, kept = self.quantizers[site], self.plan[site], self.statistics.sites[site]
        spec, samples = quantizer.spec, kept.sample
        mean = kept.channels.mean if spec.centered else None
        if plan["range"] == "percentile":
            ends = kept.histogram.find_range(plan["percentile"])
        else:
            ends = kept.channels.find_range(spec.group_size, mean)
        fixed = {} if mean is None else {"shift": mean.reshape(quantizer.shift.shape)}
        scales = quantizer.clip_factor[..., 0] if spec.dynamic else quantizer.scale
        candidate = Candidate.for_samples(spec, samples, ends, tuple(scales.shape), fixed.get("shift"))

        def apply(factor: torch.Tensor) -> None:
            if spec.dynamic:
                quantizer.calibrate_(clip_factor=factor.expand(candidate.count, 2), **fixed)
                return
            scale, zero_point = candidate.parameters(factor)
            chosen = {"scale": scale} if zero_point is None else {"scale": scale, "zero_point": zero_point}
            quantizer.calibrate_(**chosen, **fixed)

        if plan["range"] == "block":
            error_of, reference = self._block_error(apply)
        elif plan["range"] == "tensor":
            error_of, reference = tensor_error(samples, candidate)
        else:
            error_of, reference = self._layer_error(site, samples, candidate)
        clipping = plan["clipping"]
        if plan["range"] in ("max", "percentile") or (spec.dynamic and not clipping):
            search = keep_range(error_of, reference)
        else:
            two_sided = clipping and not spec.symmetric
            summed = plan["range"] == "tensor" or (plan["range"] == "layer" and site in self.readers)
            smooth = summed and samples.numel() >= _MANY
            search = search_factors(error_of, reference, two_sided, smooth)
        apply(search.factor)
        return _describe(search)

    def quantize_weight_(self, name: str, site: str) -> dict[str, Any]:
        """Choose the scales of a weight, round it, and measure the error of the layer's output that is left."""
        linear: QuantizedLinear = self.block.get_submodule(name)
        plan, spec = self.plan[name.rpartition(".")[2]], linear.spec
        products, weight = product_dtype(linear.weight), linear.weight.float()
        hessian = self._hessian(site, spec.centered)
        ends = measure_range(group(weight, spec.group_size))
        candidate = Candidate(spec, *ends, tuple(ends[0].shape))

        def apply(factor: torch.Tensor) -> None:
            scale, zero_point = candidate.parameters(factor)
            linear.set_integers_(quantize_weight(weight, scale, spec.grid, zero_point), scale, zero_point)

        if plan["range"] == "block":
            error_of, reference = self._block_error(apply)
        else:
            error_of, reference = weight_error(weight, candidate, None if plan["range"] == "tensor" else hessian)
        if plan["range"] == "max":
            search = keep_range(error_of, reference)
        else:
            search = search_factors(error_of, reference, two_sided=not spec.symmetric)
        report = {}
        if plan["rounding"] == "gptq":
            scale, zero_point = candidate.parameters(search.factor)
            factor = self._factor_inverse(site, spec.centered, plan["damping"])
            linear.set_integers_(round_gptq(weight, factor, scale, zero_point, spec.grid), scale, zero_point)
            report = {"damping": factor.damping}
        else:
            apply(search.factor)
        # Not `dense_weight`, which keeps what it computes: a whole block in float32, in the end.
        kept = linear.weight, linear.weight_scale, linear.weight_zero_point
        change = dequantize_weight(*kept, spec.grid).sub_(weight)
        if spec.centered:
            linear.correct_bias_(-(change @ self.statistics.sites[site].channels.mean))
        rows = slice(None, None, max(1, len(weight) // _ROWS))
        error, energy = (_output_energy(x[rows], hessian, products) for x in (change, weight))
        return _describe(search) | {"relative_error": error / energy if energy > 0 else 0.0} | report

    def _hessian(self, site: str, centered: bool) -> torch.Tensor:
        """Computed once for all linears that read a site, as is its inverse factor."""
        if (site, centered) not in self._hessians:
            kept, linears = self.statistics.sites[site], map(self.block.get_submodule, self.readers[site])
            kinds = {linear.spec.centered for linear in linears if linear.spec.enabled}
            hessian = kept.take_hessian()
            for kind in sorted(kinds):  # the one that is not centered first, copied where the other is asked for too
                own = hessian.clone() if len(kinds) > 1 and not kind else hessian
                self._hessians[site, kind] = kept.center_(own) if kind else own
        return self._hessians[site, centered]

    def forget_(self, site: str) -> None:
        """Drop what only the readers of `site` need."""
        for kind in (False, True):
            self._hessians.pop((site, kind), None)
            self._factors.pop((site, kind), None)
        self.statistics.sites[site].gram = None

    def _factor_inverse(self, site: str, centered: bool, damping: float) -> InverseFactor:
        if (site, centered) not in self._factors:
            self._factors[site, centered] = factor_inverse(self._hessian(site, centered), damping)
        return self._factors[site, centered]

    def _layer_error(self, site: str, samples: torch.Tensor, candidate: Candidate) -> tuple[ErrorOf, torch.Tensor]:
        if site in self.readers:
            weights = [self.block.get_submodule(name).weight for name in self.readers[site]]
            return activation_error(samples, candidate, weights)
        attention, kept = self.block.self_attn, self.statistics
        cap = getattr(attention, "attn_logit_softcapping", None)
        window = find_sliding_window(self.runner.config, self.block)
        prefix_keys = None if self.prefix_kv is None else self.prefix_kv[0].to(kept.queries)
        if site == Site.VALUE:
            return attention_output_error(
                kept.queries, kept.keys, samples, prefix_keys, candidate, attention.scaling, cap, window
            )
        keys, prefix_tokens = attention.key_quantizer, 0 if prefix_keys is None else prefix_keys.shape[-2]
        tables = functools.partial(self.runner.rotary_tables, self.block, kept.inputs, prefix_tokens)
        if keys.before_rope:
            cos, sin = tables()
            return attention_error(
                kept.queries,
                samples,
                prefix_keys,
                candidate,
                attention.scaling,
                lambda own: apply_rotary_pos_emb(own, own, cos, sin)[1],
                cap,
                window,
            )
        constant = torch.zeros((), device=samples.device)
        if keys.mean_taken_out:
            constant = keys.to_basis(keys.turn_mean(*tables()))
        prefix_keys = None if prefix_keys is None else keys.to_basis(prefix_keys)
        return attention_error(
            keys.to_basis(kept.queries),
            samples,
            prefix_keys,
            candidate,
            attention.scaling,
            lambda varying: varying + constant,
            cap,
            window,
        )

    def _block_error(self, apply: Callable[[torch.Tensor], None]) -> tuple[ErrorOf, torch.Tensor]:
        """One factor for all scales of a site, judged by the whole block's output."""

        device = self.statistics.inputs.device

        def error_of(factor: torch.Tensor) -> torch.Tensor:
            apply(factor)
            error = measure_block_error(self.block, self.statistics, self.prefix_kv, self.runner)
            return torch.tensor([error], device=device)

        return error_of, torch.tensor([self.statistics.energy], device=device)


@torch.no_grad()
def measure_block_error(
    block: nn.Module, statistics: BlockStatistics, prefix_kv: torch.Tensor | None, runner: BlockRunner
) -> float:
    """How far a block's output on the sampled windows is from that in full precision: the squared error, summed."""
    error = torch.zeros((), dtype=torch.float64, device=statistics.inputs.device)
    for rows in batches(len(statistics.inputs), runner.batch_size):
        found = runner.run(block, statistics.inputs[rows], prefix_kv)
        error += (found.float() - statistics.outputs[rows]).square().sum()
    return error.item()


def _output_energy(weight: torch.Tensor, hessian: torch.Tensor, dtype: torch.dtype) -> float:
    """The sum of (W H) * W for a symmetric H, from its upper triangle, `_COLUMNS` at a time; products in `dtype`."""
    total, narrow = 0.0, weight.to(dtype)
    for start in range(0, weight.shape[1], _COLUMNS):
        here = slice(start, start + _COLUMNS)
        total += ((narrow[:, here] @ hessian[here, here].to(dtype)) * weight[:, here]).sum().item()
        if start:
            total += 2 * ((narrow[:, :start] @ hessian[:start, here].to(dtype)) * weight[:, here]).sum().item()
    return total


def _describe(search: ClipSearch) -> dict[str, Any]:
    return {
        "clip_factor": search.factor.mean().item(),
        "relative_error": search.relative_error,
        "at_grid_edge": search.at_edge,
    }
