"""The exported model in formats of others, as far as they can carry it.

    compressed-tensors   weights, packed; activations where the format's schemes compute the same. Loaded by
                         transformers and by serving engines with the compressed-tensors library.
    peft                 the prefix as a PEFT prefix-tuning adapter on top of the former.

Neither has room for everything: `plan_formats` compares what the model is made of with what a format computes, exactly,
and raises unless whatever would be lost is named in `drop`. What cannot be left out without breaking the model (R4,
biases the family has no place for) is always refused. manifest.json lists what each folder keeps and drops.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.quantized import BlockSettings, QuantizedLinear, block_settings, find_site_quantizers, load_block
from pipeline.export.folder import parse_size, save_tokenizer, write_shards
from pipeline.export.params import find_misfits
from pipeline.models.architectures import find_narrowest_window
from pipeline.models.checkpoint import CONFIG, CONFIG_KEY, Checkpoint, build_skeleton, copy_companions
from pipeline.numerics.packing import pack_integers
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec, integer_range
from pipeline.runtime.artifacts import Header, replacing_folder, save_tensors, write_folder_header, write_json
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.progress import show_progress

COMPRESSED_TENSORS, PEFT = "compressed-tensors", "peft"
MANIFEST = "manifest.json"
SITES = {
    "activations": {"attention_input", "attention_output", "mlp_input", "mlp_hidden"},
    "keys": {"key"},
    "values": {"value"},
}
_LOAD = "AutoModelForCausalLM.from_pretrained(folder)"
# It expects the zero points of weights unpacked unless it dequantizes at once (compressed-tensors 0.20).
_LOAD_ASYMMETRIC = (
    "AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))"
)
_LOAD_ADAPTER = "PeftModel.from_pretrained(model, folder), model loaded from ../compressed-tensors"
_BIAS_FLAGS = ("attention_bias", "mlp_bias")  # of transformers' configs
_WORD = 4  # bytes; compressed-tensors packs rows into int32


class FormatError(PipelineError):
    """A format cannot express the model; the message says what it would lose."""


@dataclass(frozen=True)
class Plan:
    """What a format's folder will hold, what not, and how transformers or PEFT read it."""

    keeps: list[str]
    drops: list[str]
    load: str


def write_formats(
    checkpoint: Checkpoint,
    prefix_kv: torch.Tensor | None,
    folder: Path,
    formats: list[str],
    drop: list[str],
    max_shard_size: str,
    header: Header,
    start_token: int | None = None,
) -> dict[str, Plan]:
    """Replace `folder` by one subfolder per format and manifest.json.

    Args:
        checkpoint: the quantized one.
        prefix_kv: [L, 2, kv_heads, P, d] in its basis, or None.
        drop: what may be lost: activations, keys, values, prefix.
        start_token: what stands between the prefix and every text, or None.

    Raises:
        FormatError: lists everything that a format cannot express.
    """
    plans = plan_formats(checkpoint, prefix_kv is not None, formats, drop)
    with replacing_folder(folder) as partial:
        if COMPRESSED_TENSORS in plans:
            own = partial / COMPRESSED_TENSORS
            own.mkdir()
            _write_compressed_tensors(checkpoint, own, drop, max_shard_size, header)
            if PEFT in plans or prefix_kv is None:  # else the prefix is lost, and what its tokenizer does is best
                save_tokenizer(checkpoint, own, start_token)
        if PEFT in plans:
            own = partial / PEFT
            own.mkdir()
            _write_adapter(prefix_kv, own, header)
        write_json(partial / MANIFEST, {name: vars(plan) for name, plan in plans.items()})
        write_folder_header(partial, header)
    return plans


def plan_formats(checkpoint: Checkpoint, has_prefix: bool, formats: list[str], drop: list[str]) -> dict[str, Plan]:
    """What each format will keep and drop. Raises FormatError with all that is neither expressible nor in `drop`."""
    if not formats:
        return {}
    described = [block_settings(checkpoint, index) for index in range(checkpoint.block_count)]
    problems = _find_obstacles(checkpoint, described)
    window = find_narrowest_window(checkpoint.config, build_skeleton(checkpoint.config).model.layers)
    problems += find_misfits(formats, window)
    lost = {"activations": _lost_activations(checkpoint, described)}
    lost |= {what: _lost_cache(described, what) for what in ("keys", "values")}
    lost["prefix"] = "compressed-tensors has no place for it (formats may add peft)" if has_prefix else ""
    if PEFT in formats:
        lost["prefix"] = ""
        if not has_prefix:
            problems.append("peft: there is no prefix to write; remove it from export.formats")
    problems += [
        f"{what}: {reason}; add {what} to export.drop to do without"
        for what, reason in lost.items()
        if reason and what not in drop
    ]
    if problems:
        raise FormatError("export.formats cannot express this model:\n  " + "\n  ".join(problems))
    enabled = {site for own in described for site, spec in own.sites.items() if spec.enabled}
    present = ["weights", *(what for what in ("activations", "keys", "values") if enabled & SITES[what])]
    present += ["prefix"] if has_prefix else []
    kept = {"weights"} | ({"activations"} - set(drop))
    weights = [own.spec(short) for own in described for short in checkpoint.architecture.linear_sites]
    load = _LOAD if all(spec.symmetric or not spec.enabled for spec in weights) else _LOAD_ASYMMETRIC
    keeps, drops = ([what for what in present if (what in kept) is wanted] for wanted in (True, False))
    plans = {COMPRESSED_TENSORS: Plan(keeps, drops, load)}
    if PEFT in formats:
        plans[PEFT] = Plan(["prefix"], [], _LOAD_ADAPTER)
    return plans


def _find_obstacles(checkpoint: Checkpoint, described: list[BlockSettings]) -> list[str]:
    """What no `drop` can help with."""
    problems = []
    if not any(own.spec(short).enabled for own in described for short in checkpoint.architecture.linear_sites):
        problems.append("weights: none are quantized; set quantizer_init.weights.bits, or remove export.formats")
    if any(own.online_r1 for own in described):
        problems.append(
            "rotation.r1=online: q/k/v and gate/up count on a rotation of their input that transformers would not "
            "apply; set rotation.r1: hadamard (or identity)"
        )
    if any(own.online_r4 for own in described):
        problems.append(
            "rotation.r4=hadamard: down_proj counts on a rotation of its input that transformers would not apply; "
            "set rotation.r4: identity"
        )
    homeless = _homeless_biases(checkpoint)
    if homeless:
        problems.append(
            f"biases of {', '.join(homeless)}: {checkpoint.config.model_type} models have none; set "
            "quantizer_init.weights.centered: false"
        )
    return problems


def _lost_activations(checkpoint: Checkpoint, described: list[BlockSettings]) -> str:
    """Why the format's activations would not compute what the model's do; empty when they do."""
    reasons: dict[str, None] = {}
    for index, own in enumerate(described):
        for site, readers in checkpoint.architecture.site_readers.items():
            spec = own.spec(site)
            if not spec.enabled:
                continue
            if spec.centered:
                reasons["the format knows no centered activations"] = None
            if spec.group_size != -1 and not spec.dynamic:
                reasons["the format knows no static ranges by groups of channels"] = None
            weights = [own.spec(name.rpartition(".")[2]) for name in readers]
            if not all(weight.enabled for weight in weights):
                reasons["the format takes none in front of weights of 16 bits"] = None
            if not all(weight.symmetric for weight in weights):
                reasons["transformers reads asymmetric weights only without them"] = None
            if spec.dynamic:
                quantizer = find_site_quantizers(load_block(checkpoint, index), checkpoint.architecture)[site]
                if spec.symmetric or spec.group_size != -1 or (quantizer.clip_factor != 1).any():
                    reasons["the format's dynamic ranges are asymmetric, whole and never clipped"] = None
    return ", and ".join(reasons)


def _lost_cache(described: list[BlockSettings], what: str) -> str:
    enabled = any(own.spec(site).enabled for own in described for site in SITES[what])
    return "the format has no quantized cache that computes the same" if enabled else ""


def _homeless_biases(checkpoint: Checkpoint) -> list[str]:
    """Linears with a bias that the family's own class has no place for, whatever its config says."""
    skeleton = build_skeleton(_config_with_biases(checkpoint)).model.layers
    homeless = {}
    for index in range(checkpoint.block_count):
        names = checkpoint.load_block_tensors(index)
        for short, name in checkpoint.architecture.linear_sites.items():
            if f"{name}.bias" in names and skeleton[index].get_submodule(name).bias is None:
                homeless[short] = None
    return list(homeless)


def _config_with_biases(checkpoint: Checkpoint) -> Any:
    """The model's config, with places for biases where its class can have them and some linear needs one."""
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    if any(name.endswith("_proj.bias") for name in checkpoint.load_block_tensors(0)):
        for flag in _BIAS_FLAGS:
            if hasattr(config, flag):
                setattr(config, flag, True)
    return config


def _write_compressed_tensors(
    checkpoint: Checkpoint, folder: Path, drop: list[str], max_shard_size: str, header: Header
) -> None:
    layers = _Layers(checkpoint, "activations" not in drop)
    write_shards(layers.parts(), folder, parse_size(max_shard_size), header)
    copy_companions(checkpoint.folder, folder)
    config = checkpoint.read_config()
    config.pop(CONFIG_KEY)
    biased = _config_with_biases(checkpoint)
    config |= {flag: getattr(biased, flag) for flag in _BIAS_FLAGS if hasattr(biased, flag)}
    write_json(folder / CONFIG, config | {"quantization_config": layers.describe()})


class _Layers:
    """The checkpoint's tensors under compressed-tensors' names, and the schemes met on the way."""

    def __init__(self, checkpoint: Checkpoint, with_activations: bool) -> None:
        self.checkpoint = checkpoint
        self.with_activations = with_activations
        self.schemes: dict[tuple[QuantizerSpec, QuantizerSpec], list[str]] = {}
        self.plain = ["lm_head"]

    def parts(self) -> Iterator[dict[str, torch.Tensor]]:
        """Embedding, norm and head, then block by block, with full names."""
        checkpoint, architecture = self.checkpoint, self.checkpoint.architecture
        names = (architecture.embedding, architecture.final_norm, architecture.lm_head)
        yield {name: checkpoint.load_tensor(name) for name in names}
        skeleton = build_skeleton(_config_with_biases(checkpoint)).model.layers
        count = checkpoint.block_count
        for index in show_progress(range(count), count, "packing for compressed-tensors"):
            block = load_block(checkpoint, index)
            quantizers = find_site_quantizers(block, architecture)
            prefix = architecture.tensor_prefix(index)
            part = {}
            for site, readers in architecture.site_readers.items():
                for name in readers:
                    linear = block.get_submodule(name)
                    has_bias = skeleton[index].get_submodule(name).bias is not None
                    own = self._name_tensors(linear, quantizers[site], prefix + name, has_bias)
                    part |= {f"{prefix}{name}.{key}": tensor for key, tensor in own.items()}
            for name, tensor in block.state_dict().items():
                if "_proj." not in name and "quantizer." not in name:
                    part[prefix + name] = tensor
            # Copies, as in `folder.py`, and safetensors refuses what is shared.
            yield {name: tensor.clone() for name, tensor in part.items()}

    def _name_tensors(
        self, linear: QuantizedLinear, site: ActivationQuantizer, name: str, has_bias: bool
    ) -> dict[str, torch.Tensor]:
        tensors = {}
        if has_bias:
            zeros = torch.zeros(linear.out_features, dtype=linear.compute_dtype)
            tensors["bias"] = zeros if linear.bias is None else linear.bias
        if linear.weight_scale is None:
            self.plain.append(name)
            return tensors | {"weight": linear.weight}
        spec = linear.spec
        tensors |= {
            "weight_packed": pack_words(linear.weight, spec.bits, spec.symmetric),
            "weight_scale": linear.weight_scale,
            "weight_shape": torch.tensor(linear.weight.shape),
        }
        if not spec.symmetric:  # in words along the output channels
            zero_points = linear.weight_zero_point.to(torch.uint8).T.contiguous()
            tensors["weight_zero_point"] = pack_words(zero_points, spec.bits, False).T
        inputs = site.spec if self.with_activations else QuantizerSpec()
        if inputs.enabled and not inputs.dynamic:
            tensors["input_scale"] = site.scale
            if not inputs.symmetric:
                offset = integer_range(inputs.bits)[0]  # integers are signed there
                tensors["input_zero_point"] = (site.zero_point + offset).to(torch.int8)
        self.schemes.setdefault((spec, inputs), []).append(name)
        return tensors

    def describe(self) -> dict[str, Any]:
        """`quantization_config`, once `parts` has been through."""
        alone = len(self.schemes) == 1
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if alone else names,
                "weights": _describe_arguments(weights, "group" if weights.group_size != -1 else "channel"),
                "input_activations": _describe_arguments(inputs, "token" if inputs.dynamic else "tensor"),
                "output_activations": None,
                "format": "pack-quantized",
            }
            for number, ((weights, inputs), names) in enumerate(self.schemes.items())
        }
        return {
            "quant_method": COMPRESSED_TENSORS,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self.plain,
            "kv_cache_scheme": None,
        }


def pack_words(integers: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """[rows, n] int8 (symmetric) or uint8 -> int32 [rows, ceil(n bits / 32)], bits end to end (`packing.py`)."""
    packed = pack_integers(integers, bits, symmetric)
    return torch.nn.functional.pad(packed, (0, -packed.shape[-1] % _WORD)).contiguous().view(torch.int32)


def _describe_arguments(spec: QuantizerSpec, strategy: str) -> dict[str, Any] | None:
    if not spec.enabled:
        return None
    arguments = {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, "strategy": strategy}
    return arguments | {"dynamic": spec.dynamic, "group_size": spec.group_size if strategy == "group" else None}


def _write_adapter(prefix_kv: torch.Tensor, folder: Path, header: Header) -> None:
    """PEFT reads [P, L, 2, kv_heads, d], flattened to [P, …]."""
    layers, _, heads, tokens, width = prefix_kv.shape
    embeddings = prefix_kv.float().permute(3, 0, 1, 2, 4).reshape(tokens, -1)
    save_tensors(folder / "adapter_model.safetensors", {"prompt_embeddings": embeddings}, header)
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"../{COMPRESSED_TENSORS}",
        "inference_mode": True,
        "num_virtual_tokens": tokens,
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
        "token_dim": heads * width,
        "encoder_hidden_size": heads * width,
        "prefix_projection": False,
    }
    write_json(folder / "adapter_config.json", config)
