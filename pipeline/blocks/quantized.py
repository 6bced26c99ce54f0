"""The model's own decoder layer with its quantizers: no forward is copied, modules are replaced or added.

    the attention's norm      + quantizer          R1 where it is online, then site attention_input (shared by q, k, v)
    self_attn                 + key_quantizer      site key   (on the way to the cache, after RoPE)
                              + value_quantizer    site value (on the way to the cache)
    self_attn.o_proj          -> QuantizedLinear   R5 online, then site attention_output
    the MLP's norm            + quantizer          R1 where it is online, then site mlp_input (shared by gate, up)
    mlp.down_proj             -> QuantizedLinear   R4 online, then site mlp_hidden
    the other linears         -> QuantizedLinear   weights only

In blocks with a mixture of experts, the experts (and the shared expert) take the place of the MLP:

    mlp.experts               + quantizer          R1 where it is online, then site mlp_input, shared by all experts
    mlp.experts.N.down_proj   -> QuantizedLinear   R4 online, then site mlp_hidden.experts.N, a scale for each expert
    mlp.gate                  as it is             the router reads the norm's output, without R1 and quantizer

Where no norm comes before them, attention and MLP themselves have the quantizer of their input.
A block has the same structure when it is rotated in full precision (nothing calibrated, R4 and R5 online), when it is
calibrated (hooks on its quantizers), and when it is quantized. The artifact of a block holds its state dict.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import nn

from pipeline.blocks.kv_cache import KeyQuantizer, QuantizedAttention, as_quantized_attention, quantize_cache_
from pipeline.models.architectures import Architecture, uses_rope
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.experts import RoutedExperts, split_experts
from pipeline.models.layers import DecoderLayer, find_linear
from pipeline.models.sites import RESIDUAL_SITES, Site, base_site, site_group
from pipeline.numerics.grids import StoredGrid
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.numerics.kept_dtype import KeepsDtype
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec, dequantize_weight, fake_quantize, group

_QUANTIZER = tuple(f"quantizer.{name}" for name in ("scale", "zero_point", "clip_factor", "shift", "mean"))
_BUFFERS = (".weight_scale", ".weight_zero_point", *_QUANTIZER)


@dataclass(frozen=True)
class BlockSettings:
    """Settings of one block, stored in config.json next to the weights they belong to.

    Attributes:
        online_r3, online_r4, online_r5: the online rotations that the weights expect.
        r4_block_size: number of consecutive channels that R4 acts on at a time; -1 for all.
        key_before_rope: keys are quantized before RoPE, without R3.
        sites: site (a linear's short name for its weight: q_proj, …; attention_input, …, key, value) -> quantizer. A
            site that is not listed is not quantized.
        online_r1: the input of attention and MLP is multiplied by a Hadamard matrix before it is quantized.
    """

    online_r3: bool = False
    online_r4: bool = False
    key_before_rope: bool = False
    sites: dict[str, QuantizerSpec] = field(default_factory=dict)
    online_r1: bool = False
    r4_block_size: int = -1
    online_r5: bool = False

    def spec(self, site: str) -> QuantizerSpec:
        """Return the quantizer of a site or linear; the experts of a block have one setting."""
        return self.sites.get(base_site(site), QuantizerSpec())

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = vars(self) | {"sites": {site: spec.to_dict() for site, spec in self.sites.items()}}
        for name, absent in (("r4_block_size", -1), ("online_r5", False)):  # as config.json was before these keys
            if values[name] == absent:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BlockSettings":
        sites = {site: QuantizerSpec(**spec) for site, spec in values["sites"].items()}
        return cls(**{**values, "sites": sites})


@dataclass(frozen=True)
class _Dequantized:
    """A dequantized weight [out, in], the tensors that it was computed from, and their versions at that time."""

    weight: torch.Tensor
    sources: Sequence[torch.Tensor | None]
    versions: Sequence[int]

    def is_current(self, dtype: torch.dtype, sources: Sequence[torch.Tensor | None], versions: Sequence[int]) -> bool:
        same = all(old is new for old, new in zip(self.sources, sources, strict=True))
        return same and self.versions == versions and self.weight.dtype == dtype


class QuantizedLinear(KeepsDtype):
    """A linear layer with an online rotation of its input, a quantized input and a quantized weight, each optional.

    Attributes:
        weight: float [out, in]; codes [out, in] once quantized (int8 for symmetric integers, uint8 for all else); float
            again while it is trained.
        weight_scale: float32 [out, G] once quantized.
        weight_zero_point: float32 [out, G] holding integers, once quantized asymmetrically.
        unfrozen: its scales are being trained, so that its dequantized weight changes from step to step.
        levels_are_trained: its integers are being trained. Then `weight` holds them as floats, which may lie between
            two integers.
        fired: whether it has multiplied by a quantized weight.
        bias: float [out] or None; never quantized. For a centered weight it includes the correction of the mean error.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    weight_zero_point: torch.Tensor | None
    bias: torch.Tensor | None
    kept_tensors = frozenset({"weight_scale", "weight_zero_point", "weight_common"})

    def __init__(
        self,
        linear: nn.Linear,
        spec: QuantizerSpec,
        rotate_input: bool,
        input_quantizer: ActivationQuantizer | None,
        rotation_block_size: int = -1,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.spec = spec
        self.rotate_input, self.rotation_block_size = rotate_input, rotation_block_size
        self.input_quantizer = input_quantizer
        self.compute_dtype = linear.weight.dtype
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("weight_scale", None)
        self.register_buffer("weight_zero_point", None)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.unfrozen = self.levels_are_trained = False
        self.fired = False
        self._dequantized: _Dequantized | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the dequantized weight out of copies and pickles."""
        return self.__dict__ | {"_dequantized": None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._dequantized = None
        return super()._apply(fn, recurse)

    def declare_quantized_(self) -> None:
        """Give the buffers the types and shapes of a quantized weight, to be filled by `load_state_dict`."""
        if not self.spec.enabled:
            return
        scales, device = (self.out_features, self.spec.count_groups(self.in_features)), self.weight.device
        codes = self.spec.stored_grid.code_dtype
        self.weight = torch.empty(self.out_features, self.in_features, dtype=codes, device=device)
        self.weight_scale = torch.empty(scales, dtype=torch.float32, device=device)
        self.weight_zero_point = None if self.spec.symmetric else torch.empty_like(self.weight_scale)
        if self.spec.centered and self.bias is None:
            self.bias = torch.empty(self.out_features, dtype=self.compute_dtype, device=device)

    def correct_bias_(self, correction: torch.Tensor) -> None:
        """Add [out] to the bias. A layer without a bias gets one."""
        bias = torch.zeros_like(correction) if self.bias is None else self.bias.float()
        self.bias = (bias + correction).to(self.compute_dtype)

    def set_integers_(
        self, integers: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
    ) -> None:
        """Replace the weight by integers or other codes [out, in] and their scales and zero points [out, G]."""
        self.weight, self.weight_scale, self.weight_zero_point = integers, scale, zero_point
        self._dequantized = None

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight that the layer multiplies by, [out, in]; kept while its integers do not change."""
        if self.weight_scale is None:
            return self.weight
        self.fired = True
        if self.levels_are_trained:
            levels = self.weight.unflatten(-1, (self.scales.shape[1], -1))
            if self.weight_zero_point is not None:
                levels = levels - self.weight_zero_point.unsqueeze(-1)
            return (levels * self.scales.unsqueeze(-1)).flatten(-2).to(dtype)
        if self.weight.is_floating_point():  # being trained, to be rounded
            zero_point = None if self.weight_zero_point is None else self.weight_zero_point.unsqueeze(-1)
            grouped = group(self.weight, self.spec.group_size)
            rounded = fake_quantize(grouped, self.weight_scale.unsqueeze(-1), self.spec.grid, zero_point)
            return rounded.flatten(-2).to(dtype)
        if self.unfrozen:
            return self._dequantize().to(dtype)
        return self._keep_dequantized(dtype, (self.weight, self.weight_scale, self.weight_zero_point))

    def _keep_dequantized(self, dtype: torch.dtype, sources: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Return the weight [out, in], computed again only where a source or the dtype has changed."""
        if torch.compiler.is_compiling():  # a compiled graph computes it from its sources
            return self._dequantize().to(dtype)
        versions = [0 if tensor is None or tensor.is_inference() else tensor._version for tensor in sources]
        held = self._dequantized  # read once: another thread may ask for another dtype meanwhile
        if held is None or not held.is_current(dtype, sources, versions):
            with torch.inference_mode(False):  # a backward pass cannot use inference tensors
                weight = self._dequantize().to(dtype)
            held = self._dequantized = _Dequantized(weight, sources, versions)
        return held.weight

    @property
    def scales(self) -> torch.Tensor:
        """`weight_scale` of a quantized weight, float32 [out, G].

        Raises:
            RuntimeError: the weight is not quantized.
        """
        if self.weight_scale is None:
            raise RuntimeError(f"a weight [{self.out_features}, {self.in_features}] has no scales: it is not quantized")
        return self.weight_scale

    def _dequantize(self) -> torch.Tensor:
        return dequantize_weight(self.weight, self.scales, self.weight_zero_point, self.spec.grid)

    def prepare_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input after R4 or R5 and the layer's own quantizer, where it has them."""
        if self.input_quantizer is None:
            return self.rotate(x)
        return quantize_rotated(self.input_quantizer, x, self.rotate_input, self.rotation_block_size)

    def rotate(self, x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """Return x [..., in] after R4 or R5, where the layer has it, or undo it."""
        return hadamard_transform(x, inverse, self.rotation_block_size) if self.rotate_input else x

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.prepare_input(input)
        if self.unfrozen and torch.is_grad_enabled() and self._has_one_scale_per_output():
            self.fired = True
            return _MultiplyScaled.apply(
                x, self.weight, self.weight_scale, self.weight_zero_point, self.bias, self.spec.grid
            )
        return nn.functional.linear(x, self.dense_weight(x.dtype), self.bias)

    def _has_one_scale_per_output(self) -> bool:
        return not self.levels_are_trained and not self.weight.is_floating_point() and self.scales.shape[1] == 1


class _MultiplyScaled(torch.autograd.Function):
    """y = x W^T + b with W = s (n - z), one s and z per output channel, and constant integers (or floats) n.

    The gradients of s and z do not need the gradient of W, a third of all the work. With g the gradient of y,

        d/ds = sum over tokens of g (y - b) / s        d/dz = -s · sum over tokens of (g · sum over inputs of x)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        bias: torch.Tensor | None,
        grid: StoredGrid,
    ) -> torch.Tensor:
        weight = dequantize_weight(codes, scale, zero_point, grid).to(x.dtype)
        output = nn.functional.linear(x, weight, bias)
        total = None if zero_point is None else x.float().sum(-1, keepdim=True)
        ctx.save_for_backward(weight.to(output.dtype), scale, bias, output, total)
        ctx.dtype = x.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (upstream,) = gradients
        weight, scale, bias, output, total = ctx.saved_tensors
        for_x = (upstream @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        upstream, over = upstream.float(), tuple(range(upstream.dim() - 1))
        for_scale = for_zero_point = None
        if ctx.needs_input_grad[2]:
            product = output.float() if bias is None else output.float() - bias
            for_scale = (product * upstream).sum(over).unsqueeze(1) / scale
        if ctx.needs_input_grad[3]:
            for_zero_point = (upstream * total).sum(over).unsqueeze(1) * -scale
        return for_x, None, for_scale, for_zero_point, upstream.sum(over) if ctx.needs_input_grad[4] else None, None


class InputModule(nn.Module):
    """The type of a module whose input or output is quantized: norm, attention or MLP. No object is an instance."""

    quantizer: ActivationQuantizer
    rotate_input: bool


def find_input_module(block: nn.Module, architecture: Architecture, site: str) -> InputModule:
    """Return the module that has the quantizer of `attention_input` or `mlp_input`.

    Raises:
        TypeError: the block has no quantizers.
    """
    module = architecture.input_module(block, site)
    if not hasattr(module, "quantizer"):
        raise TypeError(f"{type(module).__name__} at {site} has no quantizer")
    return cast(InputModule, module)


def find_quantized_linear(block: nn.Module, name: str) -> QuantizedLinear:
    """Return a linear of a block that has quantizers.

    Raises:
        TypeError: there is another module of that name.
    """
    linear = block.get_submodule(name)
    if not isinstance(linear, QuantizedLinear):
        raise TypeError(f"{name} is a {type(linear).__name__}, not a linear with quantizers")
    return linear


def _quantize_input(module: InputModule, x: torch.Tensor) -> torch.Tensor:
    return quantize_rotated(module.quantizer, x, module.rotate_input)


def quantize_rotated(
    quantizer: ActivationQuantizer, x: torch.Tensor, rotate: bool, block_size: int = -1
) -> torch.Tensor:
    """Return x after its online rotation, if any, and its quantizer: in one pass, unless the quantizer has hooks."""
    watched = quantizer._forward_hooks or quantizer._forward_pre_hooks
    if quantizer.one_pass is not None and not watched and quantizer.one_pass.takes(x):
        quantizer.count_()
        return quantizer.one_pass(x)
    return quantizer(hadamard_transform(x, block_size=block_size) if rotate else x)


def read_input(block: nn.Module, architecture: Architecture, site: str, residual: torch.Tensor) -> torch.Tensor:
    """Return the input of the linears at `attention_input` or `mlp_input`, from the residual stream [..., D]."""
    if site == Site.MLP_INPUT and architecture.experts is not None:
        raise ValueError("the input of experts is read from a hook on them (Architecture.watch_input_)")
    module = find_input_module(block, architecture, site)
    return _quantize_input(module, residual) if architecture.input_norm(site) is None else module(residual)


def add_quantizers_(block: DecoderLayer, architecture: Architecture, settings: BlockSettings, kv_heads: int) -> None:
    """Replace the modules of a plain decoder layer as the table above lists them. Nothing is calibrated yet."""
    architecture = architecture.of_block(block)
    widths = architecture.site_widths(block)
    for site in RESIDUAL_SITES:
        # A hook keeps the norm's own class and tensor names; its output is quantized once for all its readers.
        module = cast(InputModule, architecture.input_module(block, site))
        module.quantizer = ActivationQuantizer(settings.spec(site), widths[site])
        module.rotate_input = settings.online_r1
        architecture.watch_input_(block, site, _quantize_input)
    rotated = {architecture.attention_output: (settings.online_r5, -1)}
    input_sites: dict[str, str] = {architecture.attention_output: Site.ATTENTION_OUTPUT}
    for site, (_, _, down) in architecture.mlps.items():
        rotated[down] = settings.online_r4, settings.r4_block_size
        input_sites[down] = site
    for short, name in architecture.linear_names.items():
        input_site = input_sites.get(name)
        quantizer = None if input_site is None else ActivationQuantizer(settings.spec(input_site), widths[input_site])
        rotate, blocks = rotated.get(name, (False, -1))
        linear = QuantizedLinear(find_linear(block, name), settings.spec(short), rotate, quantizer, blocks)
        block.set_submodule(name, linear)
    attention = cast(QuantizedAttention, block.self_attn)
    before_rope = settings.key_before_rope
    rotate = settings.online_r3 and not before_rope
    attention.key_quantizer = KeyQuantizer(
        settings.spec(Site.KEY),
        kv_heads,
        widths[Site.KEY],
        rotate,
        before_rope,
        turns=uses_rope(attention.config, block),
        neighbours=architecture.rope_neighbours,
    )
    if before_rope:
        attention.key_quantizer.hook_before_rope_(attention, architecture.heads_first)
    attention.value_quantizer = ActivationQuantizer(settings.spec(Site.VALUE), widths[Site.VALUE], kv_heads)
    quantize_cache_(attention)


def find_site_quantizers(block: DecoderLayer, architecture: Architecture) -> dict[str, ActivationQuantizer]:
    """Return the activation quantizers of a block, in the order data flows; none for a plain block.

    A dense block has six. With experts, there is one at `mlp_hidden.experts.0` and so on for each (see
    `SparseArchitecture`).
    """
    if not hasattr(block.self_attn, "key_quantizer"):
        return {}
    architecture = architecture.of_block(block)
    attention = as_quantized_attention(block.self_attn)
    quantizers: dict[str, ActivationQuantizer] = {
        Site.ATTENTION_INPUT: find_input_module(block, architecture, Site.ATTENTION_INPUT).quantizer,
        Site.KEY: attention.key_quantizer.quantizer,
        Site.VALUE: attention.value_quantizer,
        Site.ATTENTION_OUTPUT: _find_input_quantizer(block, architecture.attention_output),
        Site.MLP_INPUT: find_input_module(block, architecture, Site.MLP_INPUT).quantizer,
    }
    for site, (_, _, down) in architecture.mlps.items():
        quantizers[site] = _find_input_quantizer(block, down)
    return quantizers


def _find_input_quantizer(block: nn.Module, name: str) -> ActivationQuantizer:
    quantizer = find_quantized_linear(block, name).input_quantizer
    if quantizer is None:
        raise TypeError(f"{name} has no quantizer of its input")
    return quantizer


def count_expected_quantizers(settings: BlockSettings | None) -> Counter[str]:
    """Count the quantizers of each kind that the params ask for in one block, whatever was built."""
    return Counter(site_group(site) for site in (settings.sites if settings else ()))


def count_fired_quantizers(block: DecoderLayer, architecture: Architecture) -> Counter[str]:
    """Count the quantizers of each kind that have acted in this block since it was loaded.

    The quantizers of all experts count as one, which has fired if it did in every expert that got a token.
    """
    architecture = architecture.of_block(block)
    idle = _find_idle(block, architecture)
    acted: dict[str, bool] = {}
    linears = ((short, block.get_submodule(name)) for short, name in architecture.linear_names.items())
    fired = {short: linear.fired for short, linear in linears if isinstance(linear, QuantizedLinear)}
    fired |= {site: quantizer.fired > 0 for site, quantizer in find_site_quantizers(block, architecture).items()}
    for site, has_fired in fired.items():
        name = site.removeprefix(f"{Site.MLP_HIDDEN}.")
        if not {name, name.rpartition(".")[0]} & idle:
            acted[base_site(site)] = acted.get(base_site(site), True) and has_fired
    return Counter(site_group(site) for site, has_fired in acted.items() if has_fired)


def _find_idle(block: DecoderLayer, architecture: Architecture) -> set[str]:
    """Return the short names (`experts.3`) of the experts that got no token since the block was loaded."""
    if architecture.experts is None:
        return set()
    experts = block.get_submodule(architecture.experts)
    assert isinstance(experts, RoutedExperts)
    name = architecture.experts.removeprefix(f"{architecture.mlp}.")
    return {f"{name}.{index}" for index, hits in enumerate(experts.hits) if not hits}


def load_block(checkpoint: Checkpoint, index: int, device: torch.device | str = "cpu") -> DecoderLayer:
    """Load block `index` of a checkpoint, ready to run: plain, rotated, or quantized, as its config.json says.

    Raises:
        ArtifactError: the shard is missing or damaged.
        RuntimeError: its tensors are not those that the config asks for; the message lists them.
    """
    return fill_block(
        checkpoint, index, checkpoint.load_block_tensors(index), block_settings(checkpoint, index), device=device
    )


def fill_block(
    checkpoint: Checkpoint,
    index: int,
    tensors: dict[str, torch.Tensor],
    settings: BlockSettings | None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> DecoderLayer:
    """Build a block as `load_block` does, from tensors in memory.

    Args:
        settings: None for the model's plain layer; otherwise it gets its quantizers, calibrated or not.
        dtype: in which it computes; None for the checkpoint's.

    Raises:
        RuntimeError: the tensors are not those that the settings ask for; the message lists them.
    """
    block, architecture = checkpoint.build_block(index), checkpoint.architecture
    if settings is not None:
        add_quantizers_(block, architecture, settings, checkpoint.config.num_key_value_heads)
    for linear in _linears(block) if any(name.endswith(".weight_scale") for name in tensors) else ():
        linear.declare_quantized_()
    # Float weights and biases take the dtype that the model computes in. Integers and quantizers keep theirs.
    dtype = dtype or checkpoint.dtype
    cast = {
        name: tensor.to(dtype) if tensor.is_floating_point() and not _keeps_dtype(architecture, name, dtype) else tensor
        for name, tensor in split_experts(tensors, architecture.interleaved_experts).items()
    }
    calibrated = any(name.endswith(_QUANTIZER) for name in tensors)
    missing, unexpected = block.load_state_dict(cast, strict=False, assign=True)
    missing = [name for name in missing if calibrated or "quantizer." not in name]
    if missing or unexpected:
        raise RuntimeError(f"block {index}: missing tensors {missing}, unexpected {unexpected}")
    for quantizer in find_site_quantizers(block, architecture).values():
        quantizer.calibrated = calibrated and quantizer.spec.enabled
    return block.requires_grad_(False).to(device)


def _keeps_dtype(architecture: Architecture, name: str, dtype: torch.dtype) -> bool:
    """Return whether a quantizer's or a router's tensor keeps its dtype in a block that computes in `dtype`."""
    if name.endswith(_BUFFERS):
        return True
    return architecture.keeps_float32(name) and dtype.itemsize < torch.float32.itemsize


def describe_blocks(settings: Sequence[BlockSettings]) -> dict[str, Any]:
    """Describe all blocks for config.json: the first block's settings, and the blocks that differ from it."""
    overrides = {str(index): one.to_dict() for index, one in enumerate(settings) if one != settings[0]}
    return {"block": settings[0].to_dict()} | ({"overrides": overrides} if overrides else {})


def block_settings(checkpoint: Checkpoint, index: int) -> BlockSettings | None:
    """Return the settings of block `index` in a checkpoint's config.json; None for a plain model."""
    return find_settings(checkpoint.settings, index)


def require_settings(checkpoint: Checkpoint, index: int) -> BlockSettings:
    """Return the settings of block `index` in a rotated or quantized checkpoint.

    Raises:
        ValueError: it is a plain model.
    """
    settings = block_settings(checkpoint, index)
    if settings is None:
        raise ValueError(f"{checkpoint.folder}: block {index} has no settings: it is neither rotated nor quantized")
    return settings


def find_settings(described: dict[str, Any], index: int) -> BlockSettings | None:
    """Return the settings of block `index` from the output of `describe_blocks`; None for a plain model."""
    recorded = described.get("overrides", {}).get(str(index)) or described.get("block")
    return None if recorded is None else BlockSettings.from_dict(recorded)


def _linears(block: nn.Module) -> Iterator[QuantizedLinear]:
    return (module for module in block.modules() if isinstance(module, QuantizedLinear))
