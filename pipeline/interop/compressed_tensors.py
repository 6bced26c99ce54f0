"""The quantized checkpoint under the names and in the layouts of compressed-tensors, which transformers and vLLM read.

The quantizers of a linear's weight and input decide its layout:

    pack-quantized         integers, packed into int32: weights alone, or with activations of other than 8 bits
    int-quantized          integers of 8 bits, weights and activations, as int8
    float-quantized        fp8_e4m3, as float8_e4m3fn
    mxfp4-pack-quantized   two values a byte, exponents of scales as bytes
    nvfp4-pack-quantized   two values a byte, scales in E4M3; `weight_global_scale` is 1 / the scale of the tensor,
                           `input_global_scale` 1 / the scale of the activations

Experts have one tensor for each expert and projection, under the names of the family's published checkpoints. Serving
engines compute all experts of a block by one scheme. With quantized inputs they know only dynamic ones: int8 of each
token, scaled symmetrically to its largest value. Router, gate of the shared expert and lm_head are not quantized.

Readers decompress FP4 to bfloat16, which holds all of these values exactly. They cannot multiply it by float32, so the
config of such a folder says bfloat16.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.quantized import (
    BlockSettings,
    QuantizedLinear,
    find_quantized_linear,
    find_site_quantizers,
    load_block,
)
from pipeline.export.folder import parse_size, write_shards
from pipeline.importing.expert_tensors import name_in_checkpoint
from pipeline.models.architectures import Architecture
from pipeline.models.checkpoint import CONFIG, CONFIG_KEY, Checkpoint, build_skeleton, copy_companions
from pipeline.models.experts import PROJECTIONS, route_experts_
from pipeline.models.layers import DecoderLayer, find_linear, list_layers
from pipeline.models.sites import base_site
from pipeline.numerics.formats import FORMATS, INT
from pipeline.numerics.packing import pack_integers
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec, integer_range
from pipeline.runtime.artifacts import Header, write_json
from pipeline.runtime.progress import show_progress

METHOD = "compressed-tensors"
_FP4 = {"mxfp4": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}  # format -> dtype of its stored scales
_BIAS_FLAGS = ("attention_bias", "mlp_bias")  # keys of transformers' configs
_WORD = 4  # bytes; rows are packed into int32


def find_lost_activations(checkpoint: Checkpoint, all_settings: list[BlockSettings]) -> str:
    """Return why the format's activations would compute other values than the model's; empty where they do not."""
    reasons: dict[str, None] = {}  # an ordered set
    for index, settings in enumerate(all_settings):
        architecture = _find_block_architecture(checkpoint, index)
        for site, readers in architecture.site_readers.items():
            spec = settings.spec(site)
            if not spec.enabled:
                continue
            if checkpoint.architecture.experts is not None and spec.format == INT and not _is_plain_dynamic(spec):
                reasons["inputs of experts in int are dynamic, symmetric, of 8 bits and per token in engines"] = None
            if spec.centered:
                reasons["the format has no centered activations"] = None
            if spec.group_size != -1 and not spec.dynamic:
                reasons["the format has no static ranges by groups of channels"] = None
            weights = [settings.spec(name.rpartition(".")[2]) for name in readers]
            if not all(weight.enabled for weight in weights):
                reasons["the format has none for weights of 16 bits"] = None
            elif any(weight.format != spec.format for weight in weights):
                reasons[f"{METHOD} has no layout for {spec.format} with weights in another format"] = None
            if not all(weight.symmetric for weight in weights):
                reasons["transformers reads asymmetric weights only without activations"] = None
            if spec.dynamic:
                quantizer = find_site_quantizers(load_block(checkpoint, index), architecture)[site]
                clipped = (quantizer.clip_factor != 1).any()
                if checkpoint.architecture.experts is not None:
                    if clipped:
                        reasons["the dynamic ranges of engines are never clipped"] = None
                elif spec.format == INT and (spec.symmetric or spec.group_size != -1 or clipped):
                    reasons["the format's dynamic ranges are asymmetric, per token and never clipped"] = None
                if spec.format == "fp8_e4m3" and (spec.group_size != -1 or clipped):
                    reasons["the format's dynamic ranges of fp8_e4m3 are per token and never clipped"] = None
                if spec.format == "mxfp4" and clipped:
                    reasons["the format's ranges of mxfp4 are never clipped"] = None
                if spec.format == "nvfp4":
                    reasons["the format's scale of nvfp4 is static"] = None
    return ", and ".join(reasons)


def _is_plain_dynamic(spec: QuantizerSpec) -> bool:
    """Return whether a quantizer of inputs has a symmetric 8-bit range for each token."""
    return spec.dynamic and spec.symmetric and spec.bits == 8 and spec.group_size == -1


def find_expert_obstacles(checkpoint: Checkpoint, all_settings: list[BlockSettings]) -> list[str]:
    """Return a message for each reason why engines cannot compute the experts, whatever is dropped; [] without any."""
    if checkpoint.architecture.experts is None:
        return []
    problems = []
    if checkpoint.architecture.interleaved_experts:
        problems.append(
            f"export.formats: {METHOD} is written for plain experts, and those of "
            f"model_type={checkpoint.config.model_type!r} have biases and a gate of their own. Leave it out."
        )
    for index, settings in enumerate(all_settings):
        kinds = [settings.spec(f"experts.0.{part}") for part in PROJECTIONS]
        if any(kind != kinds[0] for kind in kinds):
            problems.append(
                f"quantizer_init.overrides: in block {index} the experts' gate_proj, up_proj and down_proj have "
                "different settings, and engines read one for all experts of a block. Use one."
            )
            break
    return problems


def _find_block_architecture(checkpoint: Checkpoint, index: int) -> Architecture:
    """Return the names of the parts of block `index`."""
    if checkpoint.architecture.experts is None:
        return checkpoint.architecture
    return checkpoint.architecture.of_tensors(list(checkpoint.load_block_tensors(index)))


def _build_layers(checkpoint: Checkpoint) -> list[DecoderLayer]:
    """Return the decoder layers of the model that readers build, without weights; experts have linears of their own."""
    layers = list_layers(build_skeleton(_config_with_biases(checkpoint)))
    if checkpoint.architecture.experts is not None:
        for layer in layers:
            route_experts_(layer, checkpoint.architecture.experts)
    return layers


def find_homeless_biases(checkpoint: Checkpoint) -> list[str]:
    """Return the linears with a bias that the family's class has no place for, whatever its config says."""
    layers = _build_layers(checkpoint)
    homeless = {}
    for index in range(checkpoint.block_count):
        names = checkpoint.load_block_tensors(index)
        for short, name in checkpoint.architecture.of_tensors(names).linear_names.items():
            if f"{name}.bias" in names and find_linear(layers[index], name).bias is None:
                homeless[base_site(short)] = None
    return list(homeless)


def _config_with_biases(checkpoint: Checkpoint) -> Any:
    """Return the model's config, with biases enabled where its class can have them and some linear needs one."""
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    if any(name.endswith("_proj.bias") for name in checkpoint.load_block_tensors(0)):
        for flag in _BIAS_FLAGS:
            if hasattr(config, flag):
                setattr(config, flag, True)
    return config


def write_compressed_tensors(
    checkpoint: Checkpoint, folder: Path, with_activations: bool, max_shard_size: str, header: Header
) -> None:
    """Write config and tensors of the quantized `checkpoint` into `folder`."""
    layers = _Layers(checkpoint, with_activations)
    write_shards(layers.parts(), folder, parse_size(max_shard_size), header)
    copy_companions(checkpoint.folder, folder)
    config = checkpoint.read_config()
    config.pop(CONFIG_KEY)
    biased = _config_with_biases(checkpoint)
    config |= {flag: getattr(biased, flag) for flag in _BIAS_FLAGS if hasattr(biased, flag)}
    config |= {"dtype": "bfloat16"} if needs_bfloat16(weights for weights, _ in layers.schemes) else {}
    write_json(folder / CONFIG, config | {"quantization_config": layers.describe()})


class _Layers:
    """The checkpoint's tensors under compressed-tensors' names, and the schemes that they use.

    Attributes:
        schemes: quantizers of weight and input -> names of the linears that have them, filled by `parts`.
        plain: names of linears that are not quantized.
    """

    def __init__(self, checkpoint: Checkpoint, with_activations: bool) -> None:
        self.checkpoint = checkpoint
        self.with_activations = with_activations
        self.schemes: dict[tuple[QuantizerSpec, QuantizerSpec], list[str]] = {}
        self.plain = ["lm_head"]

    def parts(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield tensors under their full names: embedding, norm and head, then block by block."""
        checkpoint, model_type = self.checkpoint, self.checkpoint.config.model_type
        architecture = checkpoint.architecture
        names = (architecture.embedding, architecture.final_norm, architecture.lm_head)
        yield {name: checkpoint.load_tensor(name) for name in names}
        layers = _build_layers(checkpoint)
        count = checkpoint.block_count
        for index in show_progress(range(count), count, "packing for compressed-tensors"):
            block = load_block(checkpoint, index)
            architecture = checkpoint.architecture.of_block(block)
            quantizers = find_site_quantizers(block, architecture)
            prefix = architecture.tensor_prefix(index)
            self.plain += [name_in_checkpoint(model_type, prefix + name) for name in architecture.routers]
            part = {}
            for site, readers in architecture.site_readers.items():
                linears = {name: find_quantized_linear(block, name) for name in readers}
                common_scale = _find_common_scale(list(linears.values()))
                for name, linear in linears.items():
                    has_bias = find_linear(layers[index], name).bias is not None
                    stored = name_in_checkpoint(model_type, prefix + name)
                    tensors = self._name_tensors(linear, quantizers[site], stored, has_bias, common_scale)
                    part |= {f"{stored}.{key}": tensor for key, tensor in tensors.items()}
            for name, tensor in block.state_dict().items():
                if "_proj." not in name and "quantizer." not in name:
                    part[name_in_checkpoint(model_type, prefix + name)] = tensor
            # Copies, as in export/folder.py; safetensors also refuses tensors that share memory.
            yield {name: tensor.clone() for name, tensor in part.items()}

    def _name_tensors(
        self,
        linear: QuantizedLinear,
        site: ActivationQuantizer,
        name: str,
        has_bias: bool,
        common_scale: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Return a linear's tensors under the format's names, and record its scheme."""
        tensors: dict[str, torch.Tensor] = {}
        if has_bias:
            zeros = torch.zeros(linear.out_features, dtype=linear.compute_dtype)
            tensors["bias"] = zeros if linear.bias is None else linear.bias
        if linear.weight_scale is None:
            self.plain.append(name)
            return tensors | {"weight": linear.weight}
        inputs = site.spec if self.with_activations else QuantizerSpec()
        layout = find_layout(linear.spec, inputs)
        tensors |= _WRITERS[layout](linear, common_scale)
        if inputs.enabled and not inputs.dynamic:
            if layout == "nvfp4-pack-quantized":
                tensors["input_global_scale"] = 1 / site.scale
            else:
                tensors["input_scale"] = site.scale
            if not inputs.symmetric:
                offset = integer_range(inputs.bits)[0]  # the format's integers are signed
                tensors["input_zero_point"] = (site.zero_point + offset).to(torch.int8)
        self.schemes.setdefault((linear.spec, inputs), []).append(name)
        return tensors

    def describe(self) -> dict[str, Any]:
        """Return `quantization_config`. Call it after `parts` is exhausted."""
        has_one_scheme = len(self.schemes) == 1
        layouts = {find_layout(weights, inputs) for weights, inputs in self.schemes}
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if has_one_scheme else names,
                "weights": _describe_arguments(weights, "channel"),
                "input_activations": _describe_arguments(inputs, "token" if inputs.dynamic else "tensor"),
                "output_activations": None,
                "format": find_layout(weights, inputs),
            }
            for number, ((weights, inputs), names) in enumerate(self.schemes.items())
        }
        return {
            "quant_method": METHOD,
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self.plain,
            "kv_cache_scheme": None,
        }


def find_layout(weights: QuantizerSpec, inputs: QuantizerSpec) -> str:
    """Return the library's name of the layout for a linear with these quantizers."""
    if weights.format in _FP4:
        return f"{weights.format}-pack-quantized"
    if weights.format == "fp8_e4m3":
        return "float-quantized"
    return "int-quantized" if inputs.enabled and weights.bits == inputs.bits == 8 else "pack-quantized"


def needs_bfloat16(weights: Iterable[QuantizerSpec]) -> bool:
    """Return whether some weights are in FP4."""
    return any(spec.enabled and spec.format in _FP4 for spec in weights)


def _write_packed(linear: QuantizedLinear, _: torch.Tensor | None) -> dict[str, torch.Tensor]:
    spec = linear.spec
    tensors = {
        "weight_packed": pack_words(linear.weight, spec.bits, spec.symmetric),
        "weight_scale": linear.scales,
        "weight_shape": torch.tensor(linear.weight.shape),
    }
    if linear.weight_zero_point is not None:  # packed along the output channels
        zero_points = linear.weight_zero_point.to(torch.uint8).T.contiguous()
        tensors["weight_zero_point"] = pack_words(zero_points, spec.bits, False).T
    return tensors


def _write_bytes(linear: QuantizedLinear, _: torch.Tensor | None) -> dict[str, torch.Tensor]:
    dtype = torch.int8 if linear.spec.format == INT else torch.float8_e4m3fn
    return {"weight": linear.weight.view(dtype), "weight_scale": linear.scales}


def _write_fp4(linear: QuantizedLinear, common_scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    packed = {"weight_packed": pack_integers(linear.weight, linear.spec.bits, symmetric=False)}
    scale, tensor_scale = linear.spec.stored_grid.pack_scale(linear.scales, common_scale)
    if tensor_scale is None:
        return packed | {"weight_scale": scale}
    return packed | {"weight_scale": scale.view(torch.float8_e4m3fn), "weight_global_scale": 1 / tensor_scale}


def _find_common_scale(linears: list[QuantizedLinear]) -> torch.Tensor | None:
    """Return one tensor scale for all nvfp4 weights that read a site, because kernels that fuse them have only one.

    Return None without such weights, or where the scales of blocks would change.
    """
    scales = [(linear.scales, linear.spec.stored_grid) for linear in linears if linear.spec.format == "nvfp4"]
    if not scales:
        return None
    factors = [grid.pack_scale(scale)[1] for scale, grid in scales]
    common_scale = torch.stack([factor for factor in factors if factor is not None]).amax(0)
    is_exact = all(
        torch.equal(grid.unpack_scale(*grid.pack_scale(scale, common_scale)), scale) for scale, grid in scales
    )
    return common_scale if is_exact else None


_WRITERS = {
    "pack-quantized": _write_packed,
    "int-quantized": _write_bytes,
    "float-quantized": _write_bytes,
    "mxfp4-pack-quantized": _write_fp4,
    "nvfp4-pack-quantized": _write_fp4,
}


def pack_words(integers: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """Pack integers [rows, n], int8 (symmetric) or uint8, into int32 [rows, ceil(n bits / 32)].

    Bits lie end to end, as in `numerics/packing.py`.
    """
    packed = pack_integers(integers, bits, symmetric)
    return torch.nn.functional.pad(packed, (0, -packed.shape[-1] % _WORD)).contiguous().view(torch.int32)


def _describe_arguments(spec: QuantizerSpec, strategy: str) -> dict[str, Any] | None:
    """Return the format's description of a quantizer, None where it is off; `strategy`: the one without groups."""
    if not spec.enabled:
        return None
    block = FORMATS[spec.format].block or spec.group_size
    strategy = strategy if block == -1 else "tensor_group" if spec.format == "nvfp4" else "group"
    kind = "int" if spec.format == INT else "float"
    arguments = {"num_bits": spec.bits, "type": kind, "symmetric": spec.symmetric, "strategy": strategy}
    arguments |= {"dynamic": spec.dynamic, "group_size": None if block == -1 else block}
    if spec.format in _FP4:
        arguments |= {"scale_dtype": _FP4[spec.format], "zp_dtype": _FP4[spec.format]}
    if spec.format == "nvfp4" and spec.group_size == -1:  # the tensor's scale is static, those of blocks are dynamic
        arguments["dynamic"] = "local"
    return arguments
