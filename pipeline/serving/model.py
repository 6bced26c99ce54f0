"""vLLM's own models with the blocks of an exported folder. No forward is copied.

vLLM builds its model as for any checkpoint. When it passes the tensors, each block is built as transformers has it and
filled; missing and unexpected tensors are errors. Then the block is taken apart and dropped:

    q_proj, k_proj, v_proj, …         side by side into vLLM's fused linears (linear.py)
    key and value quantizers, prefix  around RoPE and attention (attention.py), or with a cache of codes
                                      (code_backend.py)
    a mixture of experts              in place of vLLM's own (experts.py, mixture.py)
    lm_head in 8 bits                 in place of vLLM's own (head.py)
    norms, embedding, lm_head         vLLM's own loading

Batching, paging, chunks, cached prefixes and sampling work as for any model.
"""

import copy
import hashlib
from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.apertus import ApertusForCausalLM
from vllm.model_executor.models.exaone4 import Exaone4ForCausalLM
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.glm4_moe import Glm4MoeForCausalLM
from vllm.model_executor.models.hyperclovax import HyperCLOVAXForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.minimax_m2 import MiniMaxM2ForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.mixtral import MixtralForCausalLM
from vllm.model_executor.models.olmoe import OlmoeForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen2_moe import Qwen2MoeForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from pipeline.blocks.kv_cache import as_quantized_attention
from pipeline.blocks.quantized import find_site_quantizers
from pipeline.inference.packed_block import find_packed_linear, find_rotation
from pipeline.inference.prefixed_model import PrefixedModel
from pipeline.inference.transformers_quantizer import ExportError, build_packed_, find_missing
from pipeline.kernels.code_attention import fits_attention, make_table
from pipeline.kernels.compiler import find_kernels
from pipeline.models.architectures import find_architecture, find_sliding_window, uses_rope
from pipeline.models.checkpoint import build_skeleton
from pipeline.models.layers import DecoderLayer, list_layers
from pipeline.models.lm_head import QuantizedHead
from pipeline.models.sites import Site
from pipeline.serving.attention import (
    CachedValues,
    NoRope,
    PackedKeys,
    PackedValues,
    Rope,
    TableRope,
    TurnedKeys,
    explain_no_codes,
    find_code_attention,
)
from pipeline.serving.code_backend import CodeLayer, match_rows_, replace_attention_
from pipeline.serving.experts import Share, has_experts, take_mixture
from pipeline.serving.families import SLIDES_BY_LAYER, ServingError
from pipeline.serving.head import ServedHead
from pipeline.serving.linear import ServedLinear
from pipeline.serving.mixture import ServedMixture, replace_mixture_
from pipeline.serving.parallel import count_outputs, find_kv_heads, find_part, select_heads_
from pipeline.serving.product import find_head_product, find_product
from pipeline.serving.quantization import ServedLinearMethod, ServedQuantization, check_engine, wants_packed_cache

_ROPE_TOLERANCE = 1e-2  # tables may be in bfloat16


class FusedAttention(nn.Module):
    """The type of vLLM's attention module. No object is an instance of it, or of the two classes below."""

    qkv_proj: LinearBase
    o_proj: LinearBase
    rotary_emb: nn.Module
    attn: nn.Module


class FusedMlp(nn.Module):
    """The type of vLLM's MLP. One without a gate has an `up_proj` in place of `gate_up_proj`."""

    gate_up_proj: LinearBase
    up_proj: LinearBase
    down_proj: LinearBase
    act_fn: nn.Module


class FusedLayer(nn.Module):
    """The type of vLLM's decoder layer."""

    self_attn: FusedAttention
    mlp: FusedMlp  # in blocks with experts a `ServedMixture`, which some classes call `block_sparse_moe`


class LoadsWeights(Protocol):
    """A model of vLLM."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill parameters and return their names."""
        ...


class PrefixQuantModel(nn.Module):
    """The base class that comes before a causal language model of vLLM in the order of inheritance."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        quant_config = vllm_config.quant_config
        if not isinstance(quant_config, ServedQuantization):
            raise ServingError("quantization: vLLM read no quantization_config of this project. Get an intact folder.")
        self.exported = quant_config.exported
        check_engine(vllm_config)
        skeleton_config = copy.deepcopy(vllm_config.model_config.hf_config)
        delattr(skeleton_config, "quantization_config")
        with torch.device("cpu"):  # vLLM has set the engine's device
            skeleton = build_packed_(build_skeleton(skeleton_config), self.exported)
        match_sliding_(vllm_config, skeleton)
        state_keys_(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
        for module in self.modules():
            if isinstance(module, LinearBase) and isinstance(module.quant_method, ServedLinearMethod):
                module.bias = None  # `ServedLinear` has its own bias
        self._mixtures: dict[int, ServedMixture] = {}
        for index, (layer, block) in enumerate(zip(self._list_layers(), list_layers(skeleton), strict=True)):
            if has_experts(block):
                self._mixtures[index] = replace_mixture_(vllm_config, layer, index)
        self.config_of_engine = vllm_config
        self._skeleton: tuple[PrefixedModel | None] = (
            skeleton,
        )  # a tuple, so that torch does not register it as a submodule

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill vLLM's model with the exported tensors, and return the names of its own parameters.

        Raises:
            ServingError: weights were loaded before, or parameters of vLLM's model remain unfilled.
            ExportError: the folder lacks tensors, or has unexpected ones.
        """
        (skeleton,) = self._skeleton
        if skeleton is None:
            raise ServingError("weights cannot be loaded into a served model again. Restart the engine.")
        tensors = {name: tensor.cpu() for name, tensor in weights}
        _, unexpected = skeleton.load_state_dict(tensors, strict=False, assign=True)
        if (missing := find_missing(skeleton, tensors)) or unexpected:
            raise ExportError(
                f"the folder's tensors do not fit its config.json: missing {missing[:3]}, unexpected "
                f"{unexpected[:3]}. Get an intact copy."
            )
        if self.exported.lm_head is None:
            self._check_tie(tensors)
        device = torch.device(self.config_of_engine.device_config.device_type)
        has_kernels = device.type == "cpu" and find_kernels()
        # vLLM's cache of compiled code is keyed by this config.
        self.config_of_engine.additional_config["prefixquant"] = hash_contents(tensors, has_kernels)
        parameters = {name for name, _ in self.named_parameters()}
        loaded = cast(LoadsWeights, super()).load_weights(
            (name, tensor) for name, tensor in tensors.items() if name in parameters
        )
        if unfilled := sorted(parameters - loaded):
            raise ServingError(f"{len(unfilled)} tensors of vLLM's model were not loaded: {', '.join(unfilled[:3])}.")
        layers = self._list_layers()
        check_sliding(layers, skeleton)
        settle_rope_(layers, skeleton, self.config_of_engine.model_config.max_model_len, device)
        tables: dict[nn.Module, torch.Tensor] = {}
        for index, (layer, block) in enumerate(zip(layers, list_layers(skeleton), strict=True)):
            prefix_kv = None if skeleton.prefix_kv is None else skeleton.prefix_kv[index].clone()
            dtype = self.config_of_engine.model_config.dtype
            fill_linears_(layer, block, dtype, device)
            if index in self._mixtures:
                share = Share(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
                self._mixtures[index].take(take_mixture(block, dtype, find_product(dtype, device, ()), share))
            fill_cache_(layer, block, prefix_kv, self.config_of_engine, device, tables)
        if self.exported.lm_head is not None:
            self._fill_head_(skeleton, device)
        match_rows_([module for module in self.modules() if isinstance(module, CodeLayer)])
        self._skeleton = (None,)
        return loaded

    def _list_layers(self) -> list[FusedLayer]:
        return [cast(FusedLayer, layer) for layer in self.get_submodule("model.layers").children()]

    def _fill_head_(self, skeleton: PrefixedModel, device: torch.device) -> None:
        """Put an exported lm_head in 8 bits, or the rows of this process, into vLLM's.

        Raises:
            ServingError: vLLM's class has no lm_head.
        """
        layer, head = getattr(self, "lm_head", None), cast(nn.Module, skeleton.lm_head)
        if not isinstance(layer, ParallelLMHead) or not isinstance(layer.quant_method, ServedLinearMethod):
            raise ServingError(
                f"quantizer_init.lm_head_bits=8: vLLM's class ({type(self).__name__}) takes the embedding as lm_head. "
                "Use pipeline.quantized_model.load, or lm_head_bits: 16."
            )
        assert isinstance(head, QuantizedHead), "build_packed_ follows the same settings"
        served = ServedHead(
            head,
            dtype=self.config_of_engine.model_config.dtype,
            make_product=find_head_product(device),
            device=device,
            first=layer.tp_rank * layer.num_embeddings_per_partition,
            count=layer.num_embeddings_per_partition,
        )
        layer.quant_method.take(layer, served)

    def _check_tie(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raise ServingError if vLLM's class computes logits from the embedding, and the exported lm_head differs."""
        parameters = {name for name, _ in self.named_parameters()}
        name, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if name in tensors and name not in parameters and not torch.equal(tensors[name], tensors[embedding]):
            raise ServingError(
                f"lm_head: vLLM's class ({type(self).__name__}) takes the embedding as lm_head, and the exported ones "
                "differ. Use pipeline.quantized_model.load."
            )


def state_keys_(config: Any) -> None:
    """State settings under the keys that vLLM reads: Ministral 3's scale of queries by position, MiniMax M2's RoPE.

    vLLM asks MiniMax M2 for a score function, too, and does not use it: the exported router runs.
    """
    if config.model_type == "minimax_m2":
        config.rotary_dim = config.head_dim  # as imported, RoPE turns all channels
        config.scoring_func = "sigmoid"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("llama_4_scaling_beta"):
        config.llama_4_scaling = {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        }


def check_sliding(layers: list[FusedLayer], skeleton: PreTrainedModel) -> None:
    """Check that vLLM's layers have the windows of the exported ones, in classes that slide by layer.

    Raises:
        ServingError: they have not.
    """
    config: Any = skeleton.config
    if config.model_type not in SLIDES_BY_LAYER:
        return
    for index, (layer, block) in enumerate(zip(layers, list_layers(skeleton), strict=True)):
        window, served = find_sliding_window(config, block), getattr(layer.self_attn.attn, "sliding_window", None)
        if served != window:
            raise ServingError(
                f"layer {index}: vLLM gives it a window of {served}, the exported one has {window}. This is a bug of "
                "this project."
            )


def settle_rope_(layers: list[FusedLayer], skeleton: PreTrainedModel, length: int, device: torch.device) -> None:
    """Have vLLM's layers turn keys as transformers' do: by vLLM's RoPE where it agrees, else by transformers' tables.

    Args:
        length: max_model_len.
    """
    config: Any = skeleton.config
    rotary: Any = type(skeleton.base_model.rotary_emb)(config)
    positions = torch.arange(length)
    ropes: dict[str | None, TableRope] = {}
    for layer, block in zip(layers, list_layers(skeleton), strict=True):
        if not uses_rope(config, block):
            continue
        attention: Any = block.self_attn
        kind = getattr(attention, "layer_type", None) or getattr(attention, "attention_type", None)
        kind = kind if kind in config.rope_parameters else None
        if kind not in ropes:
            tables = rotary(torch.empty(0), positions[None], *([] if kind is None else [kind]))
            halves = [table[0, :, : attention.head_dim // 2] for table in tables]
            ropes[kind] = TableRope(torch.cat(halves, dim=-1).float().to(device))
        if not agrees(layer.self_attn.rotary_emb, ropes[kind], attention.head_dim):
            layer.self_attn.rotary_emb = ropes[kind]


def agrees(rope: Any, expected: TableRope, width: int) -> bool:
    """Return whether a RoPE of vLLM turns a head of `width` channels as expected."""
    if not hasattr(rope, "cos_sin_cache") or not hasattr(rope, "forward_native"):
        return False
    tables = expected.cos_sin_cache
    last = len(tables) - 1
    positions = torch.tensor([min(position, last) for position in (1, 7, 1009)], device=tables.device)
    keys = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(tables.device)
    _, turned = expected(positions, keys, keys)
    _, served = rope.forward_native(positions, keys.clone(), keys.clone())
    return bool((served.float() - turned).abs().max() <= _ROPE_TOLERANCE * turned.abs().max())


def match_sliding_(config: VllmConfig, skeleton: PreTrainedModel) -> None:
    """Have vLLM slide exactly the layers that slide in the exported model.

    vLLM supports models in which every layer slides. It takes a stray `sliding_window` in config.json for such a model.
    Where only some layers slide, some of its classes read the kind of each layer (`SLIDES_BY_LAYER`). The others (Qwen)
    can serve texts that are no longer than the window.

    Raises:
        ServingError: some layers slide, and texts may be longer than their window.
    """
    model = config.model_config
    windows = [find_sliding_window(model.hf_config, block) for block in list_layers(skeleton)]
    if None not in windows or (model.hf_config.model_type in SLIDES_BY_LAYER and set(windows) != {None}):
        return
    narrowest = min((window for window in windows if window is not None), default=None)
    if narrowest is not None and model.max_model_len > narrowest:
        raise ServingError(
            f"max_model_len={model.max_model_len}: in this model some layers slide (sliding_window={narrowest}) and "
            f"others do not, which vLLM cannot serve beyond the window. Pass --max-model-len {narrowest}, or run long "
            "texts by pipeline.quantized_model.load."
        )
    for text_config in {id(one): one for one in (model.hf_config, model.hf_text_config)}.values():
        text_config.sliding_window = None
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = ["full_attention"] * len(text_config.layer_types)
    config.cache_config.sliding_window = None


def hash_contents(tensors: dict[str, torch.Tensor], has_kernels: bool) -> str:
    """Return a hash of all tensors and of the kernels in use.

    Compiled code holds values of the tensors and names of operators, so it must not be reused for others.
    """
    contents = hashlib.sha256(b"kernels" if has_kernels else b"")
    for name in sorted(tensors):
        contents.update(name.encode())
        contents.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return contents.hexdigest()


def fill_linears_(layer: FusedLayer, block: DecoderLayer, dtype: torch.dtype, device: torch.device) -> None:
    """Put the linears of a loaded block of transformers into a decoder layer of vLLM, except those of experts.

    Args:
        layer: changed in place.
        dtype, device: the dtype and device of the model's computations.

    Raises:
        ServingError: a linear of the layer has another shape than the exported ones.
    """
    architecture = find_architecture(block.self_attn.config).of_block(block)
    quantizers = find_site_quantizers(block, architecture)
    attention = layer.self_attn
    fused_linears: dict[str, LinearBase] = {
        Site.ATTENTION_INPUT: attention.qkv_proj,
        Site.ATTENTION_OUTPUT: attention.o_proj,
    }
    if architecture.experts is None:
        mlp = layer.mlp
        fused_linears[Site.MLP_INPUT] = mlp.gate_up_proj if hasattr(mlp, "gate_up_proj") else mlp.up_proj
        fused_linears[Site.MLP_HIDDEN] = mlp.down_proj
    for site, fused in fused_linears.items():
        readers = architecture.site_readers[site]
        parts = [find_packed_linear(block, reader) for reader in readers]
        rotate, block_size = find_rotation(block, architecture, site)
        widths = [part.out_features for part in parts]
        layer_part = find_part(fused, widths)
        divided = [width // fused.tp_size for width in (parts[0].in_features, *widths)]
        product = find_product(dtype, device, divided)
        served = ServedLinear(
            parts,
            quantizers[site],
            rotate=rotate,
            dtype=dtype,
            make_product=product,
            block_size=block_size,
            device=device,
            layer_part=layer_part,
        )
        own_width = served.width if layer_part.rows is None else len(layer_part.rows)
        if (parts[0].in_features, own_width * count_outputs(fused)) != (fused.input_size, fused.output_size):
            raise ServingError(
                f"{site}: vLLM's layer has the shape {[fused.output_size, fused.input_size]}, the exported one "
                f"{[served.width, parts[0].in_features]}. This is a bug of this project."
            )
        if not isinstance(fused.quant_method, ServedLinearMethod):
            raise ServingError(f"{site}: vLLM computes this layer by another method. This is a bug of this project.")
        fused.quant_method.take(fused, served)
    if len(architecture.mlp_readers) == 1:  # vLLM's xIELU has parameters in bfloat16
        layer.mlp.act_fn = cast(nn.Module, block.mlp.act_fn).to(device)


def fill_cache_(
    layer: FusedLayer,
    block: DecoderLayer,
    prefix_kv: torch.Tensor | None,
    config: VllmConfig,
    device: torch.device,
    tables: dict[nn.Module, torch.Tensor],
) -> None:
    """Put the quantizers of keys and values, and the prefix, into a decoder layer of vLLM.

    Args:
        layer: changed in place.
        prefix_kv: [2, kv_heads, P, d] or None.
        device: the device of the model's computations.
        tables: RoPE -> its cosines and sines as a cache of codes reads them; grows here.

    Raises:
        ServingError: the cache should hold codes (`packed_cache`), and cannot.
    """
    attention, dtype = layer.self_attn, config.model_config.dtype
    exported, heads = as_quantized_attention(block.self_attn), find_kv_heads(attention.qkv_proj)
    keys, values = exported.key_quantizer, exported.value_quantizer
    for quantizer in (keys, values):
        select_heads_(quantizer, heads)
    prefix_kv = None if prefix_kv is None else prefix_kv[:, heads]
    rope = cast(Rope, attention.rotary_emb) if keys.turns else NoRope()
    if hasattr(attention, "apply_rope_all_layers"):  # of EXAONE 4, which would not call it in layers without RoPE
        attention.__dict__["apply_rope_all_layers"] = True
    if not wants_packed_cache(config):
        prefix_tokens = 0 if prefix_kv is None else prefix_kv.shape[2]
        attention.rotary_emb = TurnedKeys(rope, keys, dtype, device, prefix_tokens)
        attention.attn = CachedValues(attention.attn, values, keys.heads, prefix_kv, device)
        return
    if (reason := explain_no_codes(keys, values)) is not None:
        raise ServingError(f"packed_cache=true: the cache cannot hold codes, because of {reason}.")
    if not fits_attention(keys.head_dim, dtype, device):
        raise ServingError(
            f"packed_cache=true: attention over codes needs a C++ compiler and a head_dim that is a multiple of 16 (it "
            f"is {keys.head_dim}). Leave packed_cache out."
        )
    engine = cast(Attention, attention.attn)
    if cap := getattr(engine.impl, "logits_soft_cap", None):
        raise ServingError(
            f"packed_cache=true: attention over codes cannot cap scores (at {cap}). Leave packed_cache out."
        )
    if keys.mean_taken_out and rope not in tables:
        tables[rope] = make_table(find_turns(rope, keys.head_dim, config.model_config.max_model_len).to(dtype))
    code_attention = find_code_attention(
        keys,
        values,
        scale=engine.impl.scale,
        window=engine.sliding_window or 0,
        prefix_kv=prefix_kv,
        table=tables.get(rope),
    )
    attention.rotary_emb = PackedKeys(rope, keys, dtype, device)
    attention.attn = replace_attention_(config, engine, code_attention, PackedValues(values, keys.heads, dtype, device))


def find_turns(rope: Rope | NoRope, width: int, length: int) -> torch.Tensor:
    """Return cosines and then sines of `length` positions, [length, width]; 1 and 0 without RoPE."""
    if isinstance(rope, NoRope):
        return torch.tensor([1.0, 0.0]).repeat_interleave(width // 2).expand(length, width)
    return rope.cos_sin_cache[:length]


class PrefixQuantApertusForCausalLM(PrefixQuantModel, ApertusForCausalLM):
    """Apertus, whose MLP has no gate."""


class PrefixQuantExaone4ForCausalLM(PrefixQuantModel, Exaone4ForCausalLM):
    """EXAONE 4."""


class PrefixQuantGemmaForCausalLM(PrefixQuantModel, GemmaForCausalLM):
    """Gemma."""


class PrefixQuantGemma2ForCausalLM(PrefixQuantModel, Gemma2ForCausalLM):
    """Gemma 2."""


class PrefixQuantGemma3ForCausalLM(PrefixQuantModel, Gemma3ForCausalLM):
    """Gemma 3, text only."""


class PrefixQuantGlm4MoeForCausalLM(PrefixQuantModel, Glm4MoeForCausalLM):
    """GLM 4.5 and 4.6."""


class PrefixQuantHyperCLOVAXForCausalLM(PrefixQuantModel, HyperCLOVAXForCausalLM):
    """HyperCLOVA X, and GLM 4, which is imported as such."""


class PrefixQuantLlamaForCausalLM(PrefixQuantModel, LlamaForCausalLM):
    """Llama, Seed-OSS, SmolLM 3 and CWM."""


class PrefixQuantMiniMaxM2ForCausalLM(PrefixQuantModel, MiniMaxM2ForCausalLM):
    """MiniMax M2."""


class PrefixQuantMistralForCausalLM(PrefixQuantModel, MistralForCausalLM):
    """Mistral, Ministral and Ministral 3."""


class PrefixQuantMixtralForCausalLM(PrefixQuantModel, MixtralForCausalLM):
    """Mixtral, and Granite MoE, which is imported as such."""


class PrefixQuantOlmoeForCausalLM(PrefixQuantModel, OlmoeForCausalLM):
    """OLMoE."""


class PrefixQuantQwen2ForCausalLM(PrefixQuantModel, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class PrefixQuantQwen2MoeForCausalLM(PrefixQuantModel, Qwen2MoeForCausalLM):
    """Qwen2 and Qwen1.5 with experts."""


class PrefixQuantQwen3ForCausalLM(PrefixQuantModel, Qwen3ForCausalLM):
    """Qwen3."""


class PrefixQuantQwen3MoeForCausalLM(PrefixQuantModel, Qwen3MoeForCausalLM):
    """Qwen3 with experts."""
