"""Scale channels in front of quantizers so that quantizing them costs least (cross-layer equalization).

Where one linear map writes a channel and others read it, with nothing but a product in between, the channel can be
multiplied by any s > 0 on one side and divided by it on the other: in full precision nothing changes (arXiv:1906.04721,
Eq. 4), if the prefix's keys and values are scaled as their own are. There are five such places in a block:

    attention_input, mlp_input   the norm's weight · s       / s in the readers     only where R1 is online
    key                          k_proj, or k_norm, · s      / s in q_proj, or q_norm; RoPE turns two channels, which
                                                             share one s
    value                        v_proj · s                  / s in o_proj
    mlp_hidden                   up_proj · s                 / s in down_proj

A rotation then spreads the channels before they are quantized, so that the noise is the same in all directions, of a
size given by the energy of all channels, sum of s_c^2 a_c^2, with a_c the root mean square of channel c. What it costs
is given by how much the model's predictions depend on each channel, b_c: sum of b_c^2 / s_c^2. The product is least
(Cauchy-Schwarz) for

    s_c = sqrt(b_c / a_c),   where it is (sum of a_c b_c)^2 instead of (sum of a_c^2) (sum of b_c^2)

Both are measured by `sensitivity.py`. Values are scaled for the quantizer behind attention, which loses most: each head
by itself, or all together where R5 spreads them over each other. Nothing is left to do at inference.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.blocks.kv_cache import find_key_source
from pipeline.blocks.quantized import BlockSettings, QuantizedLinear, find_site_quantizers
from pipeline.blocks.walk import BlockRunner
from pipeline.models.architectures import Architecture
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.rotation.matrices import Rotation, change_heads

EQUALIZATION = "equalization.safetensors"  # "INDEX.PLACE" -> scales
_SPREAD = 32.0  # at most so far from their geometric mean: a channel that is silent here may speak elsewhere
PLACES = ("attention_input", "key", "value", "mlp_input", "mlp_hidden")
Scales = dict[str, torch.Tensor]


def choose_scales(energy: torch.Tensor, derivative: torch.Tensor) -> torch.Tensor:
    """s = (b / a)^(1/2) from a^2 and b^2 [..., C], 1 for silent channels, the others within a factor 32 of 1.

    Their geometric mean along the last dimension is 1. float32, as they are stored: who starts from full-precision
    weights must get these.
    """
    used = (energy > 0) & (derivative > 0)
    logs = torch.where(used, derivative / energy.where(used, 1.0), 1.0).log() / 4
    logs = torch.where(used, logs - logs.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp_min(1), 0.0)
    return logs.exp().clamp(1 / _SPREAD, _SPREAD).float()


def select_block(stored: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """Place -> tensor of block `index` from "INDEX.PLACE" -> tensor."""
    prefix = f"{index}."
    return {name.removeprefix(prefix): own for name, own in stored.items() if name.startswith(prefix)}


def scale_prefix(prefix_kv: torch.Tensor, scales: Scales, r2: Rotation, inverse: bool = False) -> torch.Tensor:
    """The prefix's keys and values [2, kv_heads, P, d] of a block, scaled as its own are; `inverse`: as they were."""
    keys, values = prefix_kv.double()
    scales = {place: (1 / own.double() if inverse else own.double()).to(keys.device) for place, own in scales.items()}
    if "key" in scales:
        keys = keys * _spread_pairs(scales["key"]).unsqueeze(1)
    if "value" in scales:
        values = r2.apply(r2.undo(values) * scales["value"].unsqueeze(1))
    return torch.stack((keys, values)).to(prefix_kv)


@dataclass
class Equalizer:
    """Measures what passes the places of a block, chooses their scales, and applies them.

    Attributes:
        block: with quantizers, none of them calibrated, and float weights.
        settings: the block's; of centered sites the energy about the mean counts.
        r2: of the rotated model the block is of.
        places: those to be scaled, of the five above; those that this block cannot scale are left alone.
    """

    block: nn.Module
    architecture: Architecture
    settings: BlockSettings
    r2: Rotation
    places: tuple[str, ...] = PLACES

    def __post_init__(self) -> None:
        self.head_dim = self.block.self_attn.head_dim
        self.kv_heads = self.block.self_attn.v_proj.out_features // self.head_dim
        norms = {site: self.architecture.input_norm(site) for site in ("attention_input", "mlp_input")}
        free = {site for site, norm in norms.items() if norm is not None and self.settings.online_r1}
        self.places = tuple(place for place in self.places if place not in norms or place in free)

    # What is measured -------------------------------------------------------------------------------------------------

    def make_sums(self) -> dict[str, torch.Tensor]:
        """Site -> [3, C] float64, zeros: of values, squares, squared derivatives of each channel."""
        device = self.block.get_submodule(self.architecture.mlp_output).weight.device
        widths = self.architecture.site_widths(self.block) | {"key": self.kv_heads * self.head_dim}
        sites = map(_site, self.places)
        return {site: torch.zeros(3, widths[site], dtype=torch.float64, device=device) for site in sites}

    @torch.enable_grad()
    def add_(
        self,
        sums: dict[str, torch.Tensor],
        hidden: torch.Tensor,
        derivative: torch.Tensor,
        prefix_kv: torch.Tensor | None,
        runner: BlockRunner,
    ) -> torch.Tensor:
        """Add a batch to sums: hidden states [B, T, D] before the block, and a derivative by those behind it.

        Returns:
            The derivative by hidden states before the block, [B, T, D].
        """
        hidden = hidden.detach().requires_grad_()
        with self._watching() as seen:
            output = runner.run(self.block, hidden, prefix_kv)
        *found, before = torch.autograd.grad(output, [*(seen[site] for site in sums), hidden], derivative)
        for site, own in zip(sums, found, strict=True):
            x, slope = (self._to_channels(site, y.detach()).double() for y in (seen[site], own))
            sums[site] += torch.stack((x.sum(0), x.square().sum(0), slope.square().sum(0)))
        return before

    def _to_channels(self, site: str, x: torch.Tensor) -> torch.Tensor:
        """What a site sees (keys: before RoPE), in the basis it is scaled in: [tokens, C]."""
        if site == "key":
            keys = self.block.self_attn.key_quantizer
            x = keys.split_heads(x, self.architecture.heads_first).transpose(1, 2).flatten(2)
        else:
            _, undo = self._basis(site)
            x = undo(x)
        return x.flatten(0, 1)

    @contextmanager
    def _watching(self) -> Iterator[dict[str, torch.Tensor]]:
        """What each site sees in a run."""
        seen: dict[str, torch.Tensor] = {}

        def keep_input(site: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
            return lambda module, args: seen.update({site: args[0]})

        quantizers, handles = find_site_quantizers(self.block, self.architecture), []
        for site in map(_site, self.places):
            if site == "key":
                source = find_key_source(self.block.self_attn)
                handles.append(source.register_forward_hook(lambda module, args, output: seen.update(key=output)))
            else:
                handles.append(quantizers[site].register_forward_pre_hook(keep_input(site)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    # What is changed --------------------------------------------------------------------------------------------------

    def choose(self, channels: dict[str, torch.Tensor]) -> Scales:
        """Scales of each place from means over tokens of what `add_` summed.

        Returns:
            Place -> s, float32: inputs [D], hidden channels [F], values [kv_heads, d], pairs of keys' channels
            [kv_heads, d / 2], or [1, d / 2] where k_norm has one weight for all heads.
        """
        scales = {}
        for place in self.places:
            mean, energy, slope = channels[_site(place)]
            if self.settings.spec(_site(place)).centered:
                energy = (energy - mean.square()).clamp_min(0)
            if place in ("key", "value"):  # of the heads that read one key or value
                energy, slope = (x.view(self.kv_heads, -1, self.head_dim).sum(1) for x in (energy, slope))
            if place == "key":
                energy, slope = (self._pair(x) for x in (energy, slope))
            together = place == "value" and self.settings.online_r5
            own = choose_scales(energy.flatten(), slope.flatten()) if together else choose_scales(energy, slope)
            scales[place] = own.view(energy.shape)
        return scales

    def _pair(self, x: torch.Tensor) -> torch.Tensor:
        """Sums of [kv_heads, d] over what shares a scale: two channels, and all heads where k_norm has one weight."""
        pairs = x.unflatten(-1, (2, -1)).sum(-2)
        norm = getattr(self.block.self_attn, "k_norm", None)
        return pairs.sum(0, keepdim=True) if norm is not None and norm.weight.numel() == self.head_dim else pairs

    @torch.no_grad()
    def scale_(self, scales: Scales) -> None:
        """Multiply each place's channels by its scales, and divide by them behind it, in place."""
        architecture, find = self.architecture, self.block.get_submodule
        for place, own in scales.items():
            s = own.double().to(find(architecture.mlp_output).weight.device)
            basis = self._basis(place)
            if place in ("attention_input", "mlp_input"):
                _scale_norm_(find(architecture.input_norm(place)), s, architecture.norm_offset)
                for name in architecture.site_readers[place]:
                    _scale_columns_(find(name), 1 / s, basis)
            elif place == "mlp_hidden":
                _scale_rows_(find(architecture.mlp_readers[-1]), s)
                _scale_columns_(find(architecture.mlp_output), 1 / s, basis)
            elif place == "value":
                output = find(architecture.attention_output)
                _scale_rows_(find(architecture.value), s.flatten(), basis)
                readers = output.in_features // s.numel()  # heads that read a value
                for_output = s.repeat_interleave(readers, dim=0).flatten()
                _scale_columns_(output, 1 / for_output, self._basis("attention_output"))
            else:
                self._scale_keys_(s)

    def _basis(self, place: str) -> "_Basis":
        """What leads from the channels that are scaled to those that the weights have, and back."""
        if place == "value":
            return tuple(
                lambda x, change=change: change_heads(x, change, self.head_dim)
                for change in (self.r2.apply, self.r2.undo)
            )
        writers = {"attention_output": self.architecture.attention_output, "mlp_hidden": self.architecture.mlp_output}
        if place not in writers:
            return _HADAMARD
        linear: QuantizedLinear = self.block.get_submodule(writers[place])
        inner, outer = self._basis("value") if place == "attention_output" else _SAME
        return lambda x: linear.rotate(inner(x)), lambda x: outer(linear.rotate(x, inverse=True))

    def _scale_keys_(self, pairs: torch.Tensor) -> None:
        attention = self.block.self_attn
        s = _spread_pairs(pairs)
        heads = attention.q_proj.out_features // (self.head_dim * self.kv_heads)
        for_queries = s.repeat_interleave(heads, dim=0)
        if not hasattr(attention, "k_norm"):
            _scale_rows_(attention.k_proj, s.flatten())
            _scale_rows_(attention.q_proj, 1 / for_queries.flatten())
            return
        offset = self.architecture.norm_offset
        _scale_norm_(attention.k_norm, s.flatten(), offset)
        _scale_norm_(attention.q_norm, 1 / (s if len(s) == 1 else for_queries).flatten(), offset)


def _site(place: str) -> str:
    """The quantizer that channels are scaled for."""
    return "attention_output" if place == "value" else place


def _spread_pairs(pairs: torch.Tensor) -> torch.Tensor:
    """Scales of pairs [..., d / 2] -> of channels [..., d]: RoPE turns channel i with i + d/2."""
    return torch.cat((pairs, pairs), dim=-1)


_Basis = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]
_SAME: _Basis = (lambda x: x, lambda x: x)
_HADAMARD: _Basis = (hadamard_transform, lambda x: hadamard_transform(x, inverse=True))


def _scale_norm_(norm: nn.Module, s: torch.Tensor, offset: float) -> None:
    weight = norm.weight
    norm.weight = nn.Parameter(((weight.double() + offset) * s - offset).to(weight.dtype), requires_grad=False)


def _scale_columns_(linear: QuantizedLinear, s: torch.Tensor, basis: _Basis) -> None:
    """Multiply what a linear reads by s [in]."""
    rotate, undo = basis
    linear.weight = rotate(undo(linear.weight.double()) * s).to(linear.weight.dtype)


def _scale_rows_(linear: QuantizedLinear, s: torch.Tensor, basis: _Basis = _SAME) -> None:
    """Multiply what a linear writes by s [out]."""
    rotate, undo = basis
    linear.weight = rotate(undo(linear.weight.T.double()) * s).T.contiguous().to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias = rotate(undo(linear.bias.double()) * s).to(linear.bias.dtype)
