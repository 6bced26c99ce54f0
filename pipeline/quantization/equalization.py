"""Scale channels before they are quantized, so that quantizing them costs least (cross-layer equalization).

Where one linear map writes a channel and others read it, and nothing but a product lies between them, the writer can
be multiplied by any s > 0 and the readers divided by it. In full precision nothing changes (arXiv:1906.04721, Eq. 4),
provided that the prefix's keys and values are scaled like the block's own. Five sites of a block can be scaled:

    attention_input, mlp_input   the norm's weight · s       / s in the readers     only where R1 is online
    key                          k_proj, or its norm, · s    / s in q_proj, or its norm
    value                        v_proj · s                  / s in o_proj
    mlp_hidden                   up_proj · s                 / s in down_proj

An MLP without a gate multiplies mlp_hidden by s where up_proj is multiplied by s^(1 / p), if its activation is a power:
p = 2 for relu squared. For others, mlp_hidden is not scaled (`Architecture.hidden_degree`).

In a mixture of experts, one s of mlp_input serves all experts and the router, and each expert has its own mlp_hidden.

RoPE turns keys in pairs of channels, so channels that it turns together share one s (`blocks/rope.py` finds them).

A rotation then spreads the channels before they are quantized. The quantization noise is therefore equal in all
directions, and the energy of all channels sets its size: sum of s_c^2 a_c^2, with a_c the root mean square of channel
c. The cost of the noise depends on how sensitive the model's predictions are to each channel, b_c: sum of
b_c^2 / s_c^2. By the Cauchy-Schwarz inequality, the product of the two sums is least for

    s_c = sqrt(b_c / a_c),   where it is (sum of a_c b_c)^2 instead of (sum of a_c^2) (sum of b_c^2)

`sensitivity.py` measures both. The scales of values are chosen for the quantizer of `attention_output`, which loses
most: for each head alone, or for all heads together where R5 mixes them. Inference needs no extra work.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.blocks.kv_cache import as_quantized_attention, find_key_source
from pipeline.blocks.quantized import BlockSettings, QuantizedLinear, find_quantized_linear, find_site_quantizers
from pipeline.blocks.rope import find_rope_groups
from pipeline.blocks.walk import BlockRunner
from pipeline.models.architectures import Architecture
from pipeline.models.layers import DecoderLayer, Norm, as_norm
from pipeline.models.sites import CACHE_SITES, RESIDUAL_SITES, Site, base_site
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.rotation.matrices import Rotation, change_heads
from pipeline.runtime.ranks import Ranks

EQUALIZATION = "equalization.safetensors"  # "INDEX.SITE" -> scales
EQUALIZED_SITES = tuple(site for site in Site if site != Site.ATTENTION_OUTPUT)  # scaled at the values instead
_FEW = 64  # tokens, below which the channels of an expert are not scaled
_SPREAD = 32.0  # largest factor from the geometric mean: a channel that is silent here may be loud in other text
Scales = dict[str, torch.Tensor]


def choose_scales(energy: torch.Tensor, sensitivity: torch.Tensor) -> torch.Tensor:
    """Return s = (b / a)^(1/2) for a^2 `energy` and b^2 `sensitivity` [..., C].

    The geometric mean of s along the last dimension is 1. Silent channels get 1, and all others lie within a factor of
    32 of 1. The result is float32, as it is stored: training that starts from full-precision weights must use the
    same numbers.
    """
    used = (energy > 0) & (sensitivity > 0)
    logs = torch.where(used, sensitivity / energy.where(used, 1.0), 1.0).log() / 4
    logs = torch.where(used, logs - logs.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp_min(1), 0.0)
    return logs.exp().clamp(1 / _SPREAD, _SPREAD).float()


def select_block(stored: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """Return site -> tensor of block `index` from "INDEX.SITE" -> tensor."""
    prefix = f"{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def scale_prefix(prefix_kv: torch.Tensor, scales: Scales, r2: Rotation, inverse: bool = False) -> torch.Tensor:
    """Scale the prefix's keys and values [2, kv_heads, P, d] in a block like the block's own; `inverse` undoes it."""
    keys, values = prefix_kv.double()
    factors = {site: (1 / s.double() if inverse else s.double()).to(keys.device) for site, s in scales.items()}
    if Site.KEY in factors:
        keys = keys * _spread_pairs(factors[Site.KEY], keys.shape[-1]).unsqueeze(1)
    if Site.VALUE in factors:
        values = r2.apply(r2.undo(values) * factors[Site.VALUE].unsqueeze(1))
    return torch.stack((keys, values)).to(prefix_kv)


@dataclass
class Equalizer:
    """Measures the channels of a block's sites, chooses their scales, and applies them.

    Attributes:
        block: with float weights and quantizers, none of them calibrated.
        settings: the block's. At centered sites the energy about the mean counts.
        r2: R2 of the rotated model that the block belongs to.
        sites: the sites to scale. Those that this block cannot scale are left out.
    """

    block: DecoderLayer
    architecture: Architecture
    settings: BlockSettings
    r2: Rotation
    sites: tuple[str, ...] = EQUALIZED_SITES

    def __post_init__(self) -> None:
        self.architecture = self.architecture.of_block(self.block)
        self.head_dim = self.block.self_attn.head_dim
        self.kv_heads = self.block.self_attn.v_proj.out_features // self.head_dim
        norms = {site: self.architecture.input_norm(site) for site in RESIDUAL_SITES}
        scalable = {site for site, norm in norms.items() if norm is not None and self.settings.online_r1}
        self.sites = tuple(site for site in self.sites if site not in norms or site in scalable)
        hidden_sites = () if self.architecture.hidden_degree is None else tuple(self.architecture.mlps)
        self.sites = tuple(
            name for site in self.sites for name in (hidden_sites if site == Site.MLP_HIDDEN else (site,))
        )
        # Experts read some of the tokens.
        self.counts = {
            site: torch.zeros((), dtype=torch.int64)
            for site in self.sites
            if base_site(site) == Site.MLP_HIDDEN and self.architecture.experts is not None
        }

    # Measure ----------------------------------------------------------------------------------------------------------

    def make_sums(self) -> dict[str, torch.Tensor]:
        """Return zeros [3, C] float64 for each measured site: sums of x, x^2 and squared derivatives per channel."""
        device = find_quantized_linear(self.block, self.architecture.attention_output).weight.device
        widths = self.architecture.site_widths(self.block) | {Site.KEY: self.kv_heads * self.head_dim}
        sites = map(_measured_site, self.sites)
        return {site: torch.zeros(3, widths[site], dtype=torch.float64, device=device) for site in sites}

    @torch.enable_grad()
    def add_(
        self,
        sums: dict[str, torch.Tensor],
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        prefix_kv: torch.Tensor | None,
        runner: BlockRunner,
    ) -> torch.Tensor:
        """Add a batch to `sums`.

        Args:
            hidden: [B, T, D] before the block.
            gradient: [B, T, D], the derivative of log p by the hidden states after the block.

        Returns:
            The derivative by the hidden states before the block, [B, T, D].
        """
        hidden = hidden.detach().requires_grad_()
        with self._recording() as recorded:
            output = runner.run(self.block, hidden, prefix_kv)
        sites = [site for site in sums if site in recorded]  # an expert may have no token
        inputs = [*(recorded[site] for site in sites), hidden]
        *slopes, before = torch.autograd.grad(output, inputs, gradient)
        for site, slope in zip(sites, slopes, strict=True):
            if site in self.counts:
                self.counts[site] += len(recorded[site])
            x, g = (self._to_channels(site, values.detach()).double() for values in (recorded[site], slope))
            sums[site] += torch.stack((x.sum(0), x.square().sum(0), g.square().sum(0)))
        return before

    def _to_channels(self, site: str, x: torch.Tensor) -> torch.Tensor:
        """Return recorded values, or derivatives by them, as [tokens, C] in the basis in which they are scaled."""
        if site == Site.KEY:
            keys = as_quantized_attention(self.block.self_attn).key_quantizer
            x = keys.split_heads(x, self.architecture.heads_first).transpose(1, 2).flatten(2)
        else:
            x = self._find_basis(site).undo(x)
        return x.flatten(0, -2)

    def average(self, sums: dict[str, torch.Tensor], tokens: int, ranks: Ranks) -> dict[str, torch.Tensor]:
        """Return the means over tokens of the sums of all ranks, on the CPU; zero for experts with few tokens.

        Args:
            tokens: tokens of all ranks.
        """
        ranks.sum_(*sums.values(), *self.counts.values())
        means = {}
        for site, total in sums.items():
            count = int(self.counts[site]) if site in self.counts else tokens
            means[site] = (total / count if count >= _FEW or site not in self.counts else total.zero_()).cpu()
        return means

    @contextmanager
    def _recording(self) -> Iterator[dict[str, torch.Tensor]]:
        """Record the values at each measured site during a run; keys are recorded before RoPE."""
        recorded: dict[str, torch.Tensor] = {}

        def keep_input(site: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
            return lambda module, args: recorded.update({site: args[0]})

        def keep_keys(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            recorded[Site.KEY] = output

        quantizers, handles = find_site_quantizers(self.block, self.architecture), []
        for site in map(_measured_site, self.sites):
            if site == Site.KEY:
                source = find_key_source(self.block.self_attn)
                handles.append(source.register_forward_hook(keep_keys))
            else:
                handles.append(quantizers[site].register_forward_pre_hook(keep_input(site)))
        try:
            yield recorded
        finally:
            for handle in handles:
                handle.remove()

    # Scale ------------------------------------------------------------------------------------------------------------

    def choose(self, channels: dict[str, torch.Tensor], runner: BlockRunner) -> Scales:
        """Choose the scales of each site from the means over tokens of the sums that `add_` filled.

        Returns:
            Site -> s, float32: [D] for attention_input and mlp_input, [F] for mlp_hidden, [kv_heads, d] for value.
            For key, s of each pair of channels (i, i + d/2): [kv_heads, d / 2], or [1, d / 2] where the key norm has
            one weight for all heads. Where RoPE turns other channels together, or none, s of each channel: d in place
            of d / 2.
        """
        scales = {}
        groups = find_rope_groups(self.block, runner) if Site.KEY in self.sites else None
        for site in self.sites:
            mean, energy, sensitivity = channels[_measured_site(site)]
            if self.settings.spec(_measured_site(site)).centered:
                energy = (energy - mean.square()).clamp_min(0)
            if site in CACHE_SITES:  # summed over the query heads that read one key or value head
                energy, sensitivity = (x.view(self.kv_heads, -1, self.head_dim).sum(1) for x in (energy, sensitivity))
            if site == Site.KEY and groups is not None:
                energy, sensitivity = (self._sum_groups(x, groups) for x in (energy, sensitivity))
            shape = energy.shape
            if site == Site.VALUE and self.settings.online_r5:  # R5 mixes the heads: one geometric mean for all
                energy, sensitivity = energy.flatten(), sensitivity.flatten()
            scales[site] = choose_scales(energy, sensitivity).view(shape)
            if site == Site.KEY and groups is not None and not _are_pairs(groups):
                scales[site] = scales[site][:, groups]
        return scales

    def _sum_groups(self, x: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Sum [kv_heads, d] over channels that share a scale: groups [d], and all heads where one norm scales them.

        Returns:
            [kv_heads or 1, number of groups].
        """
        if _are_pairs(groups):
            sums = x.unflatten(-1, (2, -1)).sum(-2)
        else:
            sums = x.new_zeros(len(x), int(groups.max()) + 1).index_add_(1, groups.to(x.device), x)
        norm = getattr(self.block.self_attn, self.architecture.key_norm, None)
        return sums.sum(0, keepdim=True) if norm is not None and norm.weight.numel() == self.head_dim else sums

    @torch.no_grad()
    def scale_(self, scales: Scales) -> None:
        """Multiply the writer of each site by its scales and divide the readers by them, in place."""
        architecture, find = self.architecture, functools.partial(find_quantized_linear, self.block)
        for site, stored in scales.items():
            s = stored.double().to(find(architecture.attention_output).weight.device)
            if site in RESIDUAL_SITES:
                _scale_norm_(self._find_norm(site), s, architecture.norm_offset)
                for name in architecture.site_readers[site]:
                    _scale_columns_(find(name), 1 / s, self._find_basis(site))
                for name in architecture.full_precision_readers.get(str(architecture.input_norm(site)), ()):
                    _divide_inputs_(self.block.get_submodule(name), s)  # they read the norm's output before R1
            elif site in architecture.mlps:
                _, up, down = architecture.mlps[site]
                _scale_rows_(find(up), self._take_root(s))
                _scale_columns_(find(down), 1 / s, self._find_basis(site))
            elif site == Site.VALUE:
                output = find(architecture.attention_output)
                _scale_rows_(find(architecture.value), s.flatten(), self._find_basis(site))
                query_heads = output.in_features // s.numel()  # that read one value head
                for_output = s.repeat_interleave(query_heads, dim=0).flatten()
                _scale_columns_(output, 1 / for_output, self._find_basis(Site.ATTENTION_OUTPUT))
            else:
                self._scale_keys_(s)

    def _take_root(self, s: torch.Tensor) -> torch.Tensor:
        """Return the factors of up_proj that multiply `mlp_hidden` by s."""
        degree = self.architecture.hidden_degree
        assert degree is not None, "mlp_hidden cannot be scaled in this family"
        return s if degree == 1 else s ** (1 / degree)

    def _find_norm(self, site: str) -> Norm:
        """Return the norm that writes a site. `sites` holds no site without one."""
        name = self.architecture.input_norm(site)
        if name is None:
            raise ValueError(f"{site} cannot be scaled: this family has no norm before it")
        return as_norm(self.block.get_submodule(name))

    def _find_basis(self, site: str) -> "_Basis":
        """Return the rotation that lies between the scaled channels of a site and the weights.

        attention_input, mlp_input   R1
        value                        R2 in every head
        attention_output             R2 in every head, then R5 where it is online
        mlp_hidden                   R4 where it is online
        """
        if site in RESIDUAL_SITES:
            return _HADAMARD
        if site in self.architecture.mlps:
            return self._add_online_rotation(_UNROTATED, self.architecture.mlps[site][2])
        heads = _Basis(
            apply=lambda x: change_heads(x, self.r2.apply, self.head_dim),
            undo=lambda x: change_heads(x, self.r2.undo, self.head_dim),
        )
        return heads if site == Site.VALUE else self._add_online_rotation(heads, self.architecture.attention_output)

    def _add_online_rotation(self, basis: "_Basis", name: str) -> "_Basis":
        """Return `basis` followed by the rotation that the linear `name` applies to its input, if any."""
        linear = find_quantized_linear(self.block, name)
        return _Basis(
            apply=lambda x: linear.rotate(basis.apply(x)),
            undo=lambda x: basis.undo(linear.rotate(x, inverse=True)),
        )

    def _scale_keys_(self, pairs: torch.Tensor) -> None:
        """Multiply keys and divide queries by scales of channels [kv_heads or 1, d], or of pairs (d / 2)."""
        attention = self.block.self_attn
        s = _spread_pairs(pairs, self.head_dim)
        heads = attention.q_proj.out_features // (self.head_dim * self.kv_heads)
        for_queries = s.repeat_interleave(heads, dim=0)
        key_norm, query_norm = (
            getattr(attention, name, None) for name in (self.architecture.key_norm, self.architecture.query_norm)
        )
        if key_norm is None or query_norm is None:
            _scale_rows_(find_quantized_linear(attention, "k_proj"), s.flatten())
            _scale_rows_(find_quantized_linear(attention, "q_proj"), 1 / for_queries.flatten())
            return
        offset = self.architecture.norm_offset
        _scale_norm_(key_norm, s.flatten(), offset)
        _scale_norm_(query_norm, 1 / (s if len(s) == 1 else for_queries).flatten(), offset)


def _measured_site(site: str) -> str:
    """Return the site whose quantizer the scales of `site` are chosen for."""
    return Site.ATTENTION_OUTPUT if site == Site.VALUE else site


def _spread_pairs(scales: torch.Tensor, width: int) -> torch.Tensor:
    """Return scales of channels [..., d] from scales of pairs [..., d / 2], or as they are if there is one for each.

    RoPE turns the channels i and i + d/2 of a pair together.
    """
    return scales if scales.shape[-1] == width else torch.cat((scales, scales), dim=-1)


def _are_pairs(groups: torch.Tensor) -> bool:
    """Return whether RoPE turns channels i and i + d/2 together, as in Llama, for groups [d]."""
    return groups.tolist() == list(range(len(groups) // 2)) * 2


@dataclass(frozen=True)
class _Basis:
    """A rotation of row vectors [..., C].

    Attributes:
        apply: leads from the basis in which channels are scaled to the basis of the weights.
        undo: leads back.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    undo: Callable[[torch.Tensor], torch.Tensor]

    def scale(self, rows: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Multiply rows [..., C] in the basis of the weights by s [C] in the basis of the scales."""
        return self.apply(self.undo(rows) * s)


_UNROTATED = _Basis(apply=lambda x: x, undo=lambda x: x)
_HADAMARD = _Basis(apply=hadamard_transform, undo=lambda x: hadamard_transform(x, inverse=True))


def _scale_norm_(norm: Norm, s: torch.Tensor, offset: float) -> None:
    """Multiply the output of a norm by s [C]; the norm multiplies by weight + offset."""
    weight = norm.weight
    norm.weight = nn.Parameter(((weight.double() + offset) * s - offset).to(weight.dtype), requires_grad=False)


def _divide_inputs_(module: nn.Module, s: torch.Tensor) -> None:
    """Divide the inputs of a module with a weight [out, in] by s [in]."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    module.weight = nn.Parameter((weight.double() / s).to(weight.dtype), requires_grad=False)


def _scale_columns_(linear: QuantizedLinear, s: torch.Tensor, basis: _Basis) -> None:
    """Multiply the inputs of a linear by s [in]."""
    linear.weight = basis.scale(linear.weight.double(), s).to(linear.weight.dtype)


def _scale_rows_(linear: QuantizedLinear, s: torch.Tensor, basis: _Basis = _UNROTATED) -> None:
    """Multiply the outputs of a linear by s [out]."""
    linear.weight = basis.scale(linear.weight.T.double(), s).T.contiguous().to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias = basis.scale(linear.bias.double(), s).to(linear.bias.dtype)
