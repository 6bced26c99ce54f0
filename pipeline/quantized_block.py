"""The model's own decoder layer with its quantizers: no forward is copied, modules are replaced or added.

    input_layernorm           + quantizer          site attention_input (its output, shared by q, k, v)
    self_attn                 + key_quantizer      site key   (applied by the cache, after RoPE)
                              + value_quantizer    site value (applied by the cache)
    self_attn.o_proj          -> QuantizedLinear   site attention_output
    post_attention_layernorm  + quantizer          site mlp_input (its output, shared by gate, up)
    mlp.down_proj             -> QuantizedLinear   R4 online, then site mlp_hidden
    the other linears         -> QuantizedLinear   weights only

The same structure serves three lives of a block: rotated in full precision (nothing calibrated, R4 online), under
calibration (hooks on its quantizers), and quantized. Its state dict is what the artifact of a block holds.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pipeline.architectures import Architecture
from pipeline.checkpoint import Checkpoint
from pipeline.hadamard import hadamard_transform
from pipeline.kv_cache import KeyQuantizer
from pipeline.quantizer import StaticQuantizer, dequantize_weight


@dataclass(frozen=True)
class BlockSettings:
    """What a block is asked for; kept in config.json beside the weights it belongs to. 16 bits: not quantized."""

    weight_bits: int = 16
    weight_group_size: int = -1
    activation_bits: int = 16
    key_bits: int = 16
    value_bits: int = 16
    online_r3: bool = False
    online_r4: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class QuantizedLinear(nn.Module):
    """A linear layer: online rotation of its input, quantized input, quantized weight, each only if asked for.

    Attributes:
        weight: float [out, in], or int8 [out, in] once quantized.
        weight_scale: float32 [out, G] once quantized.
        bias: float [out] or None; never quantized.
    """

    def __init__(self, linear: nn.Linear, rotate_input: bool, input_quantizer: StaticQuantizer | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rotate_input = rotate_input
        self.input_quantizer = input_quantizer
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("weight_scale", None)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self._dequantized: torch.Tensor | None = None

    def declare_quantized_(self, group_size: int) -> None:
        """Give the buffers the types and shapes of a quantized weight, to be filled by `load_state_dict`."""
        groups = 1 if group_size == -1 else self.in_features // group_size
        device = self.weight.device
        self.weight = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device=device)
        self.weight_scale = torch.empty(self.out_features, groups, dtype=torch.float32, device=device)

    def set_integers_(self, integers: torch.Tensor, scale: torch.Tensor) -> None:
        """Replace the weight by int8 [out, in] and their scales [out, G]."""
        self.weight, self.weight_scale = integers, scale.float()
        self._dequantized = None

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight the layer multiplies by, [out, in]; computed once from the integers and kept."""
        if self.weight_scale is None:
            return self.weight
        if self._dequantized is None or self._dequantized.dtype != dtype:
            self._dequantized = dequantize_weight(self.weight, self.weight_scale).to(dtype)
        return self._dequantized

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rotate_input:
            x = hadamard_transform(x)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return nn.functional.linear(x, self.dense_weight(x.dtype), self.bias)


def _quantize_output(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return module.quantizer(output)


def add_quantizers_(block: nn.Module, architecture: Architecture, settings: BlockSettings, kv_heads: int) -> None:
    """Replace the modules of a plain decoder layer as listed in the module's docstring; nothing is calibrated yet."""
    for name in (architecture.attention_norm, architecture.mlp_norm):
        # A hook keeps the norm's own class and tensor names; its output is quantized once for all its readers.
        norm = block.get_submodule(name)
        norm.quantizer = StaticQuantizer(settings.activation_bits)
        norm.register_forward_hook(_quantize_output)
    for name in architecture.linears:
        own_site = name in (architecture.attention_output, architecture.mlp_output)
        quantizer = StaticQuantizer(settings.activation_bits) if own_site else None
        rotate = settings.online_r4 and name == architecture.mlp_output
        block.set_submodule(name, QuantizedLinear(block.get_submodule(name), rotate, quantizer))
    block.self_attn.key_quantizer = KeyQuantizer(settings.key_bits, kv_heads, settings.online_r3)
    block.self_attn.value_quantizer = StaticQuantizer(settings.value_bits, (kv_heads, 1, 1))


def find_site_quantizers(block: nn.Module, architecture: Architecture) -> dict[str, StaticQuantizer]:
    """The six activation quantizers of a block with quantizers, by the names of DESIGN's table of sites."""
    return {
        "attention_input": block.get_submodule(architecture.attention_norm).quantizer,
        "key": block.self_attn.key_quantizer.quantizer,
        "value": block.self_attn.value_quantizer,
        "attention_output": block.get_submodule(architecture.attention_output).input_quantizer,
        "mlp_input": block.get_submodule(architecture.mlp_norm).quantizer,
        "mlp_hidden": block.get_submodule(architecture.mlp_output).input_quantizer,
    }


def site_readers(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Activation site -> the linears that read it."""
    attention, mlp = architecture.norms.values()
    return {
        "attention_input": attention,
        "attention_output": (architecture.attention_output,),
        "mlp_input": mlp,
        "mlp_hidden": (architecture.mlp_output,),
    }


def count_expected_quantizers(settings: BlockSettings | None) -> dict[str, int]:
    """How many quantizers of each kind one block must have: what the params ask for, not what was built."""
    settings = settings or BlockSettings()
    return {
        "weights": 7 * (settings.weight_bits < 16),
        "activations": 4 * (settings.activation_bits < 16),
        "keys": int(settings.key_bits < 16),
        "values": int(settings.value_bits < 16),
    }


def count_fired_quantizers(block: nn.Module, architecture: Architecture) -> dict[str, int]:
    """How many quantizers of each kind have acted in this block since it was loaded."""
    weights = sum(
        isinstance(module, QuantizedLinear) and module.weight_scale is not None and module._dequantized is not None
        for module in block.modules()
    )
    if not hasattr(block.self_attn, "key_quantizer"):
        return {"weights": weights, "activations": 0, "keys": 0, "values": 0}
    sites = find_site_quantizers(block, architecture)
    fired = {name: int(quantizer.fired > 0) for name, quantizer in sites.items()}
    activations = sum(fired[name] for name in site_readers(architecture))
    return {"weights": weights, "activations": activations, "keys": fired["key"], "values": fired["value"]}


def load_block(checkpoint: Checkpoint, index: int, device: torch.device | str = "cpu") -> nn.Module:
    """Block `index` of a checkpoint, ready to run: plain, rotated, or quantized, as its config.json says.

    Raises:
        ArtifactError: the shard is missing or damaged.
        RuntimeError: its tensors are not those the config asks for (torch's message lists them).
    """
    return fill_block(checkpoint, index, checkpoint.load_block_tensors(index), block_settings(checkpoint), device)


def fill_block(
    checkpoint: Checkpoint,
    index: int,
    tensors: dict[str, torch.Tensor],
    settings: BlockSettings | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """As `load_block`, from tensors in memory, with settings and a compute dtype other than the checkpoint's.

    `settings` None gives the model's plain layer; with settings it gets its quantizers, calibrated or not.
    """
    block = checkpoint.build_block(index)
    if settings is not None:
        add_quantizers_(block, checkpoint.architecture, settings, checkpoint.config.num_key_value_heads)
    quantized = any(name.endswith(".weight_scale") for name in tensors)
    for linear in _linears(block) if quantized else ():
        linear.declare_quantized_(settings.weight_group_size)
    # Integers stay integers; float weights and biases take the dtype the model computes in, scales stay float32.
    dtype = dtype or checkpoint.dtype
    is_scale = (".weight_scale", "quantizer.scale")
    cast = {
        name: tensor.to(dtype) if tensor.is_floating_point() and not name.endswith(is_scale) else tensor
        for name, tensor in tensors.items()
    }
    calibrated = any(name.endswith("quantizer.scale") for name in tensors)
    missing, unexpected = block.load_state_dict(cast, strict=False, assign=True)
    missing = [name for name in missing if calibrated or not name.endswith("quantizer.scale")]
    if missing or unexpected:
        raise RuntimeError(f"block {index}: missing tensors {missing}, unexpected {unexpected}")
    for module in block.modules():
        if isinstance(module, StaticQuantizer) and module.bits < 16:
            if calibrated:
                module.calibrated = True
            else:
                module.scale = torch.full(module.scale.shape, torch.nan)
    return block.requires_grad_(False).to(device)


def block_settings(checkpoint: Checkpoint) -> BlockSettings | None:
    """What a checkpoint's config.json records of its blocks; None for a plain model."""
    recorded = checkpoint.settings.get("block")
    return None if recorded is None else BlockSettings(**recorded)


def linear_widths(checkpoint: Checkpoint) -> dict[str, int]:
    """Name in the checkpoint -> in_features, of the first block's linears (all blocks are alike)."""
    block, prefix = checkpoint.build_block(0), checkpoint.architecture.block_prefix.format(index=0)
    return {prefix + name: block.get_submodule(name).in_features for name in checkpoint.architecture.linears}


def _linears(block: nn.Module) -> Iterator[QuantizedLinear]:
    return (module for module in block.modules() if isinstance(module, QuantizedLinear))
