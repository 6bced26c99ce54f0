"""Choose the scales, zero points and clip factors of every quantizer of one block, and round its weights.

Quantizers are taken in the order in which data flows through the block, activations before weights. Each is judged by
the statistics of the block in full precision (`scale_search.py`). The objective `block` is the exception: for every
factor, the block runs with all quantizers chosen so far, and its output is compared with the full-precision output.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.blocks.kv_cache import as_quantized_attention, turn_keys
from pipeline.blocks.quantized import find_quantized_linear, find_site_quantizers
from pipeline.blocks.walk import BlockRunner, batches
from pipeline.models.architectures import Architecture, find_sliding_window
from pipeline.models.layers import DecoderLayer
from pipeline.models.sites import INPUT_SITES, Site, base_site
from pipeline.numerics.gptq import InverseFactor, factor_inverse, measure_offsets, round_gptq
from pipeline.numerics.quantizer import dequantize_weight, group, measure_range, quantize_weight
from pipeline.quantization.params import SiteSettings
from pipeline.quantization.scale_search import (
    AttentionProbabilities,
    Candidate,
    ClipSearch,
    Objective,
    find_product_dtype,
    keep_range,
    make_activation_objective,
    make_key_objective,
    make_tensor_objective,
    make_value_objective,
    make_weight_objective,
    search_factors,
)
from pipeline.quantization.statistics import BlockStatistics

_COLUMNS = 2048  # of a weight, whose product with a Gram matrix is in memory at a time
_MANY = 2**16  # values, over which a sum of errors is smooth
STACKED = 1 << 25  # entries of the weights of experts that are rounded together
_ROWS = 1024  # of a weight, evenly spread, that its reported error is measured on (all, up to twice as many)
SiteReport = dict[str, float]  # clip_factor, relative_error, at_grid_edge, damping


@torch.no_grad()
def choose_quantizers_(
    block: DecoderLayer,
    architecture: Architecture,
    statistics: BlockStatistics,
    *,
    prefix_kv: torch.Tensor | None,
    site_settings: dict[str, SiteSettings],
    runner: BlockRunner,
    offsets: dict[str, torch.Tensor] | None = None,
) -> dict[str, SiteReport]:
    """Calibrate every quantizer of `block` in place and replace its weights by integers.

    Args:
        block: not calibrated, as when its statistics were recorded.
        statistics: the block's; Gram matrices are used up.
        prefix_kv: [2, kv_heads, P, d] or None.
        site_settings: for each site and linear that is to be quantized.
        offsets: filled with `measure_offsets` of each linear [out, in] float16, by its name; None: not computed.

    Returns:
        Site or linear -> {"clip_factor": the mean factor, "relative_error": the error relative to the signal, in the
        site's objective, "at_grid_edge": how many optima lie at the low end of the grid}. The error of a weight is that
        of its layer's outputs (of large layers: some of them). A weight rounded by GPTQ also has "damping".
    """
    architecture = architecture.of_block(block)
    chooser = _Chooser(
        block=block,
        architecture=architecture,
        statistics=statistics,
        prefix_kv=prefix_kv,
        site_settings=site_settings,
        runner=runner,
        offsets=offsets,
    )
    report = {}
    for site, quantizer in chooser.quantizers.items():
        if quantizer.spec.enabled:
            report[site] = chooser.calibrate_(site)
    for site, readers in architecture.site_readers.items():
        for names in chooser.stack_readers(readers):
            for name, values in chooser.quantize_weights_(names, site).items():
                report[chooser.shorten(name)] = values
        chooser.forget_(site)
    return report


@dataclass(kw_only=True)
class _Chooser:
    """The arguments of `choose_quantizers_`, and the matrices that several of its choices share."""

    block: DecoderLayer
    architecture: Architecture
    statistics: BlockStatistics
    prefix_kv: torch.Tensor | None
    site_settings: dict[str, SiteSettings]
    runner: BlockRunner
    offsets: dict[str, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        self.quantizers = find_site_quantizers(self.block, self.architecture)
        self._hessians: dict[tuple[str, bool], torch.Tensor] = {}
        self._factors: dict[tuple[str, bool], InverseFactor] = {}
        self._short_names = {name: short for short, name in self.architecture.linear_names.items()}

    def shorten(self, name: str) -> str:
        """Return a linear's short name, as in reports: mlp.up_proj -> up_proj, of experts experts.0.up_proj."""
        return self._short_names[name]

    def stack_readers(self, readers: tuple[str, ...]) -> list[list[str]]:
        """Return the quantized linears among the readers of a site, in the groups that are quantized together.

        In a dense block each linear is a group. The gate (or up) projections of all experts read the same input and
        have the same settings, so that they are rounded as one linear with more rows, up to a limit.
        """
        names = [name for name in readers if find_quantized_linear(self.block, name).spec.enabled]
        if self.architecture.experts is None:
            return [[name] for name in names]
        stacks: dict[str, list[list[str]]] = {}
        for name in names:
            kind, size = base_site(self.shorten(name)), find_quantized_linear(self.block, name).weight.numel()
            groups = stacks.setdefault(kind, [])
            room = STACKED // size
            if not groups or len(groups[-1]) >= max(1, room) or self.site_settings[kind].range == "block":
                groups.append([])
            groups[-1].append(name)
        return [group for groups in stacks.values() for group in groups]

    def calibrate_(self, site: str) -> SiteReport:
        """Choose the scales, or the clip factors of dynamic scales, of a site's quantizer."""
        quantizer, settings = self.quantizers[site], self.site_settings[base_site(site)]
        statistics = self.statistics.sites[site]
        spec, samples = quantizer.spec, statistics.sample
        mean = statistics.channels.mean if spec.centered else None
        if settings.range == "percentile":
            ends = statistics.histogram.find_range(settings.percentile)
        else:
            ends = statistics.channels.find_range(spec.group_size, mean)
        shift = {} if mean is None else {"shift": mean.reshape(quantizer.shift.shape)}
        scales = quantizer.clip_factor[..., 0] if spec.dynamic else quantizer.scale
        candidate = Candidate.for_samples(spec, samples, ends, tuple(scales.shape), shift.get("shift"))

        def apply(factor: torch.Tensor) -> None:
            if spec.dynamic:
                quantizer.calibrate_(clip_factor=factor.expand(candidate.count, 2), **shift)
                return
            scale, zero_point = candidate.find_parameters(factor)
            offset = {} if zero_point is None else {"zero_point": zero_point}
            quantizer.calibrate_(scale=scale, **offset, **shift)

        if settings.range == "block":
            objective = self._make_block_objective(apply)
        elif settings.range == "tensor":
            objective = make_tensor_objective(samples, candidate)
        else:
            objective = self._make_layer_objective(site, samples, candidate)
        if settings.range in ("max", "percentile") or (spec.dynamic and not settings.clipping):
            search = keep_range(objective)
        else:
            is_sum = settings.range == "tensor" or (settings.range == "layer" and base_site(site) in INPUT_SITES)
            search = search_factors(
                objective,
                two_sided=settings.clipping and not spec.symmetric,
                smooth=is_sum and samples.numel() >= _MANY,
            )
        apply(search.factor)
        return _describe(search)

    def quantize_weights_(self, names: list[str], site: str) -> dict[str, SiteReport]:
        """Choose the scales of weights that read `site`, round them, and measure the remaining error of the outputs.

        Args:
            names: linears with the same settings. Their rows are treated as one linear.
        """
        linears = [find_quantized_linear(self.block, name) for name in names]
        settings, spec = self.site_settings[base_site(self.shorten(names[0]))], linears[0].spec
        product_dtype = find_product_dtype(linears[0].weight)
        weight = torch.cat([linear.weight for linear in linears]).float() if linears[1:] else linears[0].weight.float()
        sizes = [linear.out_features for linear in linears]
        hessian = self._find_hessian(site, spec.centered)
        low, high = measure_range(group(weight, spec.group_size))
        candidate = Candidate(spec, low, high, tuple(low.shape))

        def set_integers(integers: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> None:
            zero_points = [None] * len(linears) if zero_point is None else zero_point.split(sizes)
            parts = zip(linears, integers.split(sizes), scale.split(sizes), zero_points, strict=True)
            for linear, codes, scales, offsets in parts:
                linear.set_integers_(codes, scales, offsets)

        def apply(factor: torch.Tensor) -> None:
            scale, zero_point = candidate.find_parameters(factor)
            set_integers(quantize_weight(weight, scale, spec.grid, zero_point), scale, zero_point)

        if settings.range == "block":
            objective = self._make_block_objective(apply)
        else:
            objective = make_weight_objective(weight, candidate, None if settings.range == "tensor" else hessian)
        if settings.range == "max":
            search = keep_range(objective)
        else:
            search = search_factors(objective, two_sided=not spec.symmetric)
        damping, factor = {}, None
        if settings.rounding == "gptq":
            scale, zero_point = candidate.find_parameters(search.factor)
            factor = self._find_inverse_factor(site, spec.centered, settings.damping)
            set_integers(round_gptq(weight, factor, scale, zero_point, spec.grid), scale, zero_point)
            damping["damping"] = factor.damping
        else:
            apply(search.factor)
        if self.offsets is not None:
            codes = torch.cat([linear.weight for linear in linears])
            scale, zero_point = candidate.find_parameters(search.factor)
            offsets = measure_offsets(weight, codes, scale, zero_point, spec.grid, factor).to(torch.float16)
            self.offsets |= {name: part.clone() for name, part in zip(names, offsets.split(sizes), strict=True)}
        reports = {}
        searches = [search] if not linears[1:] else search.split([size * low.shape[1] for size in sizes])
        rows_each = max(1, _ROWS // len(linears))
        for name, linear, part, own_search in zip(names, linears, weight.split(sizes), searches, strict=True):
            # `dense_weight` would keep its result: in the end a whole block in float32.
            rounded = dequantize_weight(linear.weight, linear.scales, linear.weight_zero_point, spec.grid)
            change = rounded.sub_(part)
            if spec.centered:
                linear.correct_bias_(-(change @ self.statistics.sites[site].channels.mean))
            rows = slice(None, None, max(1, len(part) // rows_each))
            error, energy = (_output_energy(x[rows], hessian, product_dtype) for x in (change, part))
            reports[name] = _describe(own_search) | damping
            reports[name]["relative_error"] = error / energy if energy > 0 else 0.0
        return reports

    def _find_hessian(self, site: str, centered: bool) -> torch.Tensor:
        """Return the Hessian of a site [C, C]: the mean of x^T x, or of (x - mean)^T (x - mean) if `centered`.

        The first call uses up the site's Gram matrix, so it computes all Hessians that the readers of the site need.
        """
        if (site, centered) not in self._hessians:
            statistics = self.statistics.sites[site]
            linears = [find_quantized_linear(self.block, name) for name in self.architecture.site_readers[site]]
            kinds = {linear.spec.centered for linear in linears if linear.spec.enabled}
            hessian = statistics.take_hessian()
            if False in kinds:  # a copy if the other is needed too, because centering happens in place
                self._hessians[site, False] = hessian.clone() if True in kinds else hessian
            if True in kinds:
                self._hessians[site, True] = statistics.center_(hessian)
        return self._hessians[site, centered]

    def _find_inverse_factor(self, site: str, centered: bool, damping: float) -> InverseFactor:
        """Return the factor that GPTQ needs of a Hessian, computed once for all readers of the site."""
        if (site, centered) not in self._factors:
            self._factors[site, centered] = factor_inverse(self._find_hessian(site, centered), damping)
        return self._factors[site, centered]

    def forget_(self, site: str) -> None:
        """Drop the matrices that only the readers of `site` need."""
        for centered in (False, True):
            self._hessians.pop((site, centered), None)
            self._factors.pop((site, centered), None)
        self.statistics.sites[site].gram = None

    def _make_layer_objective(self, site: str, samples: torch.Tensor, candidate: Candidate) -> Objective:
        """Return the objective `layer` of a site."""
        if base_site(site) in INPUT_SITES:
            weights = [self._weigh_reader(name, site) for name in self.architecture.site_readers[site]]
            return make_activation_objective(samples, candidate, weights)
        queries, keys = self.statistics.queries, self.statistics.keys
        prefix_keys = None if self.prefix_kv is None else self.prefix_kv[0].to(queries)
        if site == Site.VALUE:
            return make_value_objective(self._attend_to(queries, prefix_keys), keys, samples, candidate)
        quantizer = as_quantized_attention(self.block.self_attn).key_quantizer
        if quantizer.before_rope:
            cos, sin = self._make_rotary_tables()
            attend = self._attend_to(queries, prefix_keys)
            return make_key_objective(
                attend,
                samples,
                candidate,
                finish=lambda keys: turn_keys(keys, cos, sin, quantizer.neighbours) if quantizer.turns else keys,
            )
        constant = torch.zeros((), device=samples.device)
        if quantizer.mean_taken_out:
            constant = quantizer.to_basis(quantizer.turn_mean(*self._make_rotary_tables()))
        prefix_keys = None if prefix_keys is None else quantizer.to_basis(prefix_keys)
        attend = self._attend_to(quantizer.to_basis(queries), prefix_keys)
        return make_key_objective(attend, samples, candidate, finish=lambda varying: varying + constant)

    def _weigh_reader(self, name: str, site: str) -> torch.Tensor:
        """Return the weight of a linear that reads `site`, times the root of the share of tokens that it reads.

        So the error of an expert's outputs counts as often as the router chooses it. In dense blocks the share is 1.
        """
        weight = find_quantized_linear(self.block, name).weight
        prefix = f"{self.architecture.experts}."
        if site != Site.MLP_INPUT or not name.startswith(prefix):
            return weight
        tokens = self.statistics.uses[int(name.removeprefix(prefix).partition(".")[0])].tokens
        return weight * math.sqrt(tokens / self.statistics.sites[site].channels.count)

    def _attend_to(self, queries: torch.Tensor, prefix_keys: torch.Tensor | None) -> AttentionProbabilities:
        """Return the block's attention probabilities as a function of the keys."""
        attention = self.block.self_attn
        return AttentionProbabilities(
            queries,
            prefix_keys,
            kv_heads=self.statistics.keys.shape[1],
            scaling=attention.scaling,
            cap=getattr(attention, "attn_logit_softcapping", None),
            window=find_sliding_window(self.runner.config, self.block),
            sinks=getattr(attention, "sinks", None),
        )

    def _make_rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin) of the positions of the sampled windows."""
        prefix_tokens = 0 if self.prefix_kv is None else self.prefix_kv.shape[-2]
        return self.runner.rotary_tables(self.block, self.statistics.inputs, prefix_tokens)

    def _make_block_objective(self, apply: Callable[[torch.Tensor], None]) -> Objective:
        """Return the objective `block`: one factor for all scales of a site, judged by the whole block's output."""
        device = self.statistics.inputs.device

        def error_of(factor: torch.Tensor) -> torch.Tensor:
            apply(factor)
            error = measure_block_error(self.block, self.statistics, self.prefix_kv, self.runner)
            return torch.tensor([error], device=device)

        return Objective(error_of, torch.tensor([self.statistics.energy], device=device))


@torch.no_grad()
def measure_block_error(
    block: DecoderLayer, statistics: BlockStatistics, prefix_kv: torch.Tensor | None, runner: BlockRunner
) -> float:
    """Return the summed squared error of a block's output on the sampled windows, against full precision."""
    error = torch.zeros((), dtype=torch.float64, device=statistics.inputs.device)
    for rows in batches(len(statistics.inputs), runner.batch_size):
        output = runner.run(block, statistics.inputs[rows], prefix_kv)
        error += (output.float() - statistics.outputs[rows]).square().sum()
    return error.item()


def _output_energy(weight: torch.Tensor, hessian: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the sum of (W H) * W for a symmetric H, from its upper triangle, with products in `dtype`."""
    total, narrow = 0.0, weight.to(dtype)
    for start in range(0, weight.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        total += ((narrow[:, columns] @ hessian[columns, columns].to(dtype)) * weight[:, columns]).sum().item()
        if start:
            total += 2 * ((narrow[:, :start] @ hessian[:start, columns].to(dtype)) * weight[:, columns]).sum().item()
    return total


def _describe(search: ClipSearch) -> SiteReport:
    return {
        "clip_factor": search.factor.mean().item(),
        "relative_error": search.relative_error,
        "at_grid_edge": search.at_edge,
    }
