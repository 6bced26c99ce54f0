"""Rewrite a checkpoint at import into an equivalent one of a plainer family, which all later stages use.

    phi3             fused linears, RoPE on a part of each head            -> mistral
    glm              fused gate_up_proj, RoPE on neighbours of a part      -> llama
    glm4             the same, with norms after attention and MLP          -> hyperclovax
    helium           RoPE on neighbouring channels                         -> llama
    ernie4_5         RoPE on neighbouring channels                         -> llama
    granite          four multipliers                                      -> llama
    granitemoehybrid the same, with a fused MLP, neither experts nor mamba -> llama
    granitemoe       four multipliers, other names of experts and router   -> mixtral
    glm4_moe         RoPE on a part of each head                           -> itself, with RoPE on all of it
    minimax_m2       the same                                              -> itself, likewise
    hunyuan_v1_moe   the same number of chosen experts stated by layer     -> itself, with one number
    hyperclovax      four multipliers, maybe norms after attention and MLP -> llama, hyperclovax without multipliers

**Fused linears** are split by rows. **RoPE** of Llama turns channels (i, i + d/2) of a head. Where a family turns
(2i, 2i + 1), or only the first R channels, the rows of q_proj and k_proj are permuted; scores do not change. Channels
that are not turned get the frequency 0: with theta' = theta^(d / R), frequency i is theta'^(-2i / d) = theta^(-2i / R)
for i < R/2, and 0 for others (rope_type proportional). LongRoPE divides frequencies by factors, which are 1e30 there.

**Multipliers.** With h = m_e E[token] + m_r (outputs of o_proj and down_proj), logits = W norm(h) / s and scores
m_a q k, the stream is divided by m_e. An RMSNorm gives the same output if eps is divided by m_e^2:

    o_proj, down_proj · m_r / m_e     q_proj · m_a sqrt(d)     final norm / s     eps / m_e^2

Embedding and lm_head keep their values, and may stay tied.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import HyperCLOVAXConfig, LlamaConfig, MistralConfig, MixtralConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.importing.obstacles import explain_obstacles
from pipeline.importing.source import Read
from pipeline.models.architectures import UnsupportedModelError

_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "sliding_window",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_FINAL_NORM = "model.norm.weight"
_OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
_GRANITE_EXPERTS = {  # as the hub has them, and as transformers holds them
    "block_sparse_moe.input_linear.weight": "mlp.experts.gate_up_proj",
    "block_sparse_moe.output_linear.weight": "mlp.experts.down_proj",
    "block_sparse_moe.router.layer.weight": "mlp.gate.weight",
    "block_sparse_moe.router.weight": "mlp.gate.weight",
    "block_sparse_moe.experts.gate_up_proj": "mlp.experts.gate_up_proj",
    "block_sparse_moe.experts.down_proj": "mlp.experts.down_proj",
}
_POST_NORMS = {"post_self_attn_layernorm": "post_norm1", "post_mlp_layernorm": "post_norm2"}  # glm4 -> hyperclovax
_LARGEST_EXPONENT = 38  # of a float32
_UNTURNED = 1e30  # a factor of LongRoPE that divides a frequency to 0
_NAME = re.compile(r"(?P<block>model\.layers\.\d+\.)(?P<module>.+)\.(?P<kind>weight|bias)")
_TENSOR = re.compile(r"(?P<block>model\.layers\.\d+\.)(?P<tensor>.+)")


@dataclass(frozen=True)
class PlainCheckpoint:
    """A checkpoint in the form of the family that is imported.

    Attributes:
        config: config of that family.
        names: names of its tensors.
        read: name -> the tensor; in float64 where it was multiplied.
        changes: a phrase for each change; empty where nothing was rewritten.
        rounds: whether the dtype of the import rounds tensors that the source's own class would not round.
    """

    config: Any
    names: set[str]
    read: Read
    changes: tuple[str, ...] = ()
    rounds: bool = False


@dataclass
class _Plan:
    """How the tensors of a plain family are made of those stored.

    Attributes:
        config: config of the plain family.
        modules: module in a block -> its parts in the plain family, with their rows; one part None: all rows.
        channels: channels of each head of q and k, as indices into the stored ones, [d].
        channel_factors: factors of the channels of each head of q and k, [d] float64.
        head_norms: norm of queries or keys before RoPE -> how many heads its weight has channels of.
        tensors: tensor in a block -> its name in the plain family; looked up before `modules`.
        factors: module (or tensor of `tensors`) in a block of the plain family -> factor of weight and bias.
        final_norm: factor of the final norm.
        zero_biases: linears of the plain family that need a bias which the source lacks -> their size.
    """

    config: Any
    changes: list[str] = field(default_factory=list)
    modules: dict[str, dict[str, int | None]] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    channels: list[int] | None = None
    channel_factors: torch.Tensor | None = None
    head_norms: dict[str, int] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    final_norm: float = 1.0
    zero_biases: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """A tensor of the plain family: rows of a stored one, times factors, or `zeros` zeros."""

    name: str = ""
    rows: slice | torch.Tensor | None = None
    factors: torch.Tensor | None = None
    zeros: int = 0

    def make(self, read: Read) -> torch.Tensor:
        if self.zeros:
            return torch.zeros(self.zeros)
        tensor = read(self.name)
        if self.rows is not None:
            tensor = tensor[self.rows].clone()
        if self.factors is not None:
            tensor = tensor.double() * self.factors.view(-1, *[1] * (tensor.dim() - 1))
        return tensor


def rewrite_checkpoint(config: PreTrainedConfig, names: set[str], read: Read) -> PlainCheckpoint:
    """Return a checkpoint in the form of the plain family; unchanged if its family needs no rewriting.

    Raises:
        UnsupportedModelError: the model computes something that the plain family does not.
    """
    planner = _PLANNERS.get(config.model_type)
    if planner is None:
        return PlainCheckpoint(config, names, read)
    plan = planner(config)
    parts = _list_parts(plan, names)
    return PlainCheckpoint(
        config=plan.config,
        names=set(parts),
        read=lambda name: parts[name].make(read),
        changes=tuple(plan.changes),
        rounds=any(part.factors is not None and not _is_exact(part.factors) for part in parts.values()),
    )


def _list_parts(plan: _Plan, names: set[str]) -> dict[str, _Part]:
    """Return the tensors of the plain family by name."""
    config, parts = plan.config, dict[str, _Part]()
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads or config.num_attention_heads,
        **plan.head_norms,
    }
    for name in names:
        whole = _TENSOR.fullmatch(name)
        if whole is not None and whole["tensor"] in plan.tensors:
            renamed = plan.tensors[whole["tensor"]]
            factor = plan.factors.get(renamed, 1.0)
            parts[f"{whole['block']}{renamed}"] = _Part(name, factors=None if factor == 1 else _as_factors(factor))
            continue
        match = _NAME.fullmatch(name)
        if match is None:
            factor = plan.final_norm if name == _FINAL_NORM else 1.0
            parts[name] = _Part(name, factors=None if factor == 1 else _as_factors(factor))
            continue
        start = 0
        for module, size in plan.modules.get(match["module"], {match["module"]: None}).items():
            rows: slice | torch.Tensor | None = None if size is None else slice(start, start + size)
            factors = _as_factors(plan.factors.get(module, 1.0))
            if module in heads and plan.channels is not None:
                order = torch.tensor(plan.channels)
                starts = torch.arange(heads[module])[:, None] * len(order)
                rows = start + (starts + order).flatten()
            if module in heads and plan.channel_factors is not None:
                factors = factors * plan.channel_factors.repeat(heads[module])
            scaled = None if (factors == 1).all() else factors
            parts[f"{match['block']}{module}.{match['kind']}"] = _Part(name, rows, scaled)
            start += size or 0
    blocks = {match["block"] for name in names if (match := _NAME.fullmatch(name))}
    for module, size in plan.zero_biases.items():
        parts |= {f"{block}{module}.bias": _Part(zeros=size) for block in blocks}
    return parts


def _as_factors(factor: float) -> torch.Tensor:
    return torch.tensor([factor], dtype=torch.float64)


def _is_exact(factors: torch.Tensor) -> bool:
    """Return whether products with all of these are exact: powers of two."""
    return bool((torch.frexp(factors)[0].abs() == 0.5).all())


def _copy_config(kind: type[PreTrainedConfig], config: PreTrainedConfig, **changes: Any) -> Any:
    values = {key: getattr(config, key) for key in _COPIED if hasattr(config, key)}
    name = f"{kind.__name__.removesuffix('Config')}ForCausalLM"
    return kind(**values | changes, architectures=[name], dtype=config.dtype)


def _find_head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# RoPE -----------------------------------------------------------------------------------------------------------------


def _turn_like_llama_(plan: _Plan, config: Any, neighbours: bool) -> None:
    """Have a plan permute the channels of q and k, so that RoPE turns them as Llama does, and set its RoPE.

    Args:
        neighbours: whether RoPE of the source turns channels (2i, 2i + 1), not (i, i + R/2) of the first R.
    """
    width, rope = _find_head_width(config), dict(config.rope_parameters)
    share = rope.get("partial_rotary_factor", 1.0)
    turned = int(width * share)
    if turned % 2 or width % 2 or turned < 2:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} with partial_rotary_factor={share} is not supported: RoPE turns "
            f"{turned} of {width} channels of a head, which are no pairs."
        )
    first = list(range(0, turned, 2)) if neighbours else list(range(turned // 2))
    second = list(range(1, turned, 2)) if neighbours else list(range(turned // 2, turned))
    rest = list(range(turned, width))
    half = len(rest) // 2
    channels = [*first, *rest[:half], *second, *rest[half:]]
    if channels == list(range(width)):
        return
    plan.channels = channels
    pairs = "neighbouring channels" if neighbours else "channels"
    plan.changes.append(f"rows of q_proj and k_proj are permuted, because RoPE turns {pairs} of each head together")
    if turned == width:
        return
    exponent = width / turned
    if exponent * math.log10(rope["rope_theta"]) > _LARGEST_EXPONENT:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} with partial_rotary_factor={share} is not supported: RoPE turns only "
            f"{turned} of {width} channels, and rope_theta^{exponent:g} would exceed float32."
        )
    theta = rope["rope_theta"] ** exponent
    plan.changes[-1] += f"; it leaves {width - turned} of {width} channels as they are"
    if rope["rope_type"] == "longrope":
        spread = {key: [*rope[key], *[_UNTURNED] * (width // 2 - turned // 2)] for key in _LONG_FACTORS}
        plan.config.rope_parameters = rope | spread | {"rope_theta": theta, "partial_rotary_factor": 1.0}
        _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config)
        # RoPE's tables have this factor in all channels; the source has it only in those that it turns.
        untouched = torch.tensor(channels) >= turned
        plan.channel_factors = torch.where(untouched, 1 / attention_factor, 1.0).double()
    elif rope["rope_type"] == "default":
        share = turned / width
        plan.config.rope_parameters = {
            "rope_type": "proportional",
            "rope_theta": theta,
            "partial_rotary_factor": share if int(share * width // 2) == turned // 2 else (turned + 0.5) / width,
        }
    else:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} with rope_type={rope['rope_type']!r} and partial_rotary_factor={share} "
            "is not supported: RoPE on a part of each head is rewritten for the types default and longrope only."
        )


_LONG_FACTORS = ("short_factor", "long_factor")


def _split_gate_up(config: Any) -> dict[str, int | None]:
    return {"mlp.gate_proj": config.intermediate_size, "mlp.up_proj": config.intermediate_size}


def _add_output_bias_(plan: _Plan, config: Any) -> None:
    """Give o_proj a bias of zero in a family whose attention has biases in q, k and v only."""
    if config.attention_bias:
        plan.zero_biases = {"self_attn.o_proj": config.hidden_size}
        plan.changes.append("o_proj gets a bias of zero")


def _plan_phi3(config: Any) -> _Plan:
    width = config.hidden_size // config.num_attention_heads
    plan = _Plan(_copy_config(MistralConfig, config, head_dim=width), ["fused linears are split"])
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    plan.modules = {
        "self_attn.qkv_proj": {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys},
        "mlp.gate_up_proj": _split_gate_up(config),
    }
    _turn_like_llama_(plan, config, neighbours=False)
    return plan


def _plan_glm(config: Any) -> _Plan:
    plain = _copy_config(LlamaConfig, config, head_dim=_find_head_width(config), attention_bias=config.attention_bias)
    plan = _Plan(plain, ["fused linears are split"])
    plan.modules = {"mlp.gate_up_proj": _split_gate_up(config)}
    _add_output_bias_(plan, config)
    _turn_like_llama_(plan, config, neighbours=True)
    return plan


def _plan_glm4(config: Any) -> _Plan:
    width = _find_head_width(config)
    plain = _copy_config(
        HyperCLOVAXConfig,
        config,
        head_dim=width,
        attention_bias=config.attention_bias,
        attention_multiplier=width**-0.5,
        use_post_norm=True,
    )
    plan = _Plan(plain, ["fused linears are split", "norms after attention and MLP are renamed"])
    plan.modules = {"mlp.gate_up_proj": _split_gate_up(config)}
    plan.modules |= {name: {plain_name: None} for name, plain_name in _POST_NORMS.items()}
    _add_output_bias_(plan, config)
    _turn_like_llama_(plan, config, neighbours=True)
    return plan


def _plan_helium(config: Any) -> _Plan:
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    plan = _Plan(_copy_config(LlamaConfig, config, head_dim=config.head_dim, **biases))
    _add_output_bias_(plan, config)
    _turn_like_llama_(plan, config, neighbours=True)
    return plan


def _plan_ernie(config: Any) -> _Plan:
    biases = {"attention_bias": bool(config.use_bias), "mlp_bias": bool(config.use_bias)}
    plan = _Plan(_copy_config(LlamaConfig, config, head_dim=_find_head_width(config), **biases))
    _turn_like_llama_(plan, config, neighbours=True)
    return plan


# Multipliers ----------------------------------------------------------------------------------------------------------


def _fold_multipliers_(plan: _Plan, config: Any, divide_logits: bool, post_norms: tuple[str, ...] = ()) -> None:
    """Have a plan fold the multipliers of a config into weights.

    Args:
        divide_logits: whether logits are divided by logits_scaling, not multiplied.
        post_norms: those between o_proj or down_proj and the residual stream. They take the factor of the stream, and
            the linears are divided like eps, so that the norms return the same.
    """
    stated = {key: getattr(config, key) for key in _MULTIPLIERS}
    wrong = [f"{key}={value}" for key, value in stated.items() if not (value and 0 < value < math.inf)]
    if wrong:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} with {', '.join(wrong)} is not supported: multipliers must be positive."
        )
    embedding = config.embedding_multiplier
    to_stream = config.residual_multiplier / embedding
    plan.config.rms_norm_eps = config.rms_norm_eps / embedding**2
    plan.factors = {"self_attn.q_proj": config.attention_multiplier * math.sqrt(_find_head_width(config))}
    for_outputs = 1 / embedding if post_norms else to_stream
    for name in _OUTPUTS:
        plan.factors[name] = for_outputs
    for name in post_norms:
        plan.factors[name] = to_stream
    plan.factors = {name: _settle_one(factor) for name, factor in plan.factors.items()}
    plan.final_norm = 1 / config.logits_scaling if divide_logits else config.logits_scaling
    values = ", ".join(f"{key}={value}" for key, value in stated.items())
    plan.changes.append(f"multipliers are folded into weights and rms_norm_eps ({values})")


def _settle_one(factor: float) -> float:
    """Return 1 for a factor that is 1 up to rounding, so that weights stay as they are."""
    return 1.0 if math.isclose(factor, 1) else factor


def _plan_granite(config: Any) -> _Plan:
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    plan = _Plan(_copy_config(LlamaConfig, config, head_dim=_find_head_width(config), **biases))
    _fold_multipliers_(plan, config, divide_logits=True)
    return plan


def _plan_granite_hybrid(config: Any) -> _Plan:
    values = config.to_dict()
    if config.num_local_experts or any(kind not in ("full_attention", "attention") for kind in config.layer_types):
        raise UnsupportedModelError(explain_obstacles(values))
    if config.position_embedding_type != "rope":
        raise UnsupportedModelError(
            f"model_type='granitemoehybrid' with position_embedding_type={config.position_embedding_type!r} is not "
            "supported: it has no RoPE, and Llama, as which its dense models are imported, has."
        )
    size = config.shared_intermediate_size
    plain = _copy_config(
        LlamaConfig,
        config,
        head_dim=_find_head_width(config),
        intermediate_size=size,
        attention_bias=config.attention_bias,
    )
    plan = _Plan(plain, ["fused linears are split"])
    plan.modules = {
        "shared_mlp.input_linear": {"mlp.gate_proj": size, "mlp.up_proj": size},
        "shared_mlp.output_linear": {"mlp.down_proj": None},
    }
    _fold_multipliers_(plan, config, divide_logits=True)
    return plan


def _plan_granite_moe(config: Any) -> _Plan:
    """Plan a granitemoe as a mixtral: a softmax over the chosen logits is one over all that is made to sum to one."""
    plain = _copy_config(
        MixtralConfig,
        config,
        head_dim=_find_head_width(config),
        num_local_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        sliding_window=None,
    )
    if config.attention_bias:
        raise UnsupportedModelError(
            "model_type='granitemoe' with attention_bias=true is not supported: Mixtral, as which it is imported, has "
            "no biases in attention"
        )
    plan = _Plan(plain, ["tensors of experts and routers are renamed"], tensors=dict(_GRANITE_EXPERTS))
    _fold_multipliers_(plan, config, divide_logits=True)
    plan.factors["mlp.experts.down_proj"] = plan.factors.pop("mlp.down_proj")
    return plan


def _plan_hyperclovax(config: Any) -> _Plan:
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    biases |= {"head_dim": config.head_dim}
    if config.use_post_norm:
        neutral = {"attention_multiplier": config.head_dim**-0.5, "use_post_norm": True}
        plan = _Plan(_copy_config(HyperCLOVAXConfig, config, **biases, **neutral))
    else:
        plan = _Plan(_copy_config(LlamaConfig, config, **biases))
    post_norms = tuple(_POST_NORMS.values()) if config.use_post_norm else ()
    _fold_multipliers_(plan, config, divide_logits=False, post_norms=post_norms)
    return plan


def _plan_partial_rope(config: Any, head_norms: dict[str, int]) -> _Plan:
    """Plan a model as one of its own family whose RoPE has tables for all channels of a head.

    Args:
        head_norms: as in `_Plan`.
    """
    plan = _Plan(copy.deepcopy(config), head_norms=head_norms)
    rope = config.rope_parameters
    if rope["rope_type"] == "proportional":  # its tables have all channels already
        return plan
    if head_norms and rope["rope_type"] == "longrope" and rope.get("partial_rotary_factor", 1.0) != 1:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} with rope_type='longrope' is not supported: q_proj and k_proj would be "
            "divided by its factor, which norms of queries and keys undo."
        )
    _turn_like_llama_(plan, config, neighbours=False)
    return plan


def _plan_glm4_moe(config: Any) -> _Plan:
    norms = {"self_attn.q_norm": 1, "self_attn.k_norm": 1} if config.use_qk_norm else {}
    return _plan_partial_rope(config, norms)


def _plan_minimax(config: Any) -> _Plan:
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}  # norms over the whole width
    return _plan_partial_rope(config, {f"self_attn.{name}_norm": count for name, count in heads.items()})


def _plan_hunyuan_moe(config: Any) -> _Plan:
    plan = _Plan(copy.deepcopy(config))
    if isinstance(config.moe_topk, list):
        counts = set(config.moe_topk[: config.num_hidden_layers])
        if len(counts) != 1:
            raise UnsupportedModelError(
                f"model_type={config.model_type!r} with moe_topk={config.moe_topk} is not supported: its layers choose "
                "different numbers of experts."
            )
        plan.config.moe_topk = counts.pop()
    return plan


_PLANNERS: dict[str, Callable[[Any], _Plan]] = {
    "phi3": _plan_phi3,
    "glm": _plan_glm,
    "glm4": _plan_glm4,
    "helium": _plan_helium,
    "ernie4_5": _plan_ernie,
    "granite": _plan_granite,
    "granitemoehybrid": _plan_granite_hybrid,
    "granitemoe": _plan_granite_moe,
    "glm4_moe": _plan_glm4_moe,
    "minimax_m2": _plan_minimax,
    "hunyuan_v1_moe": _plan_hunyuan_moe,
    "hyperclovax": _plan_hyperclovax,
}
