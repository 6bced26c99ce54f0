"""The differences between model families, as data.

A family can be listed if its decoder layers have the shape of Llama's: separate q, k and v projections, an MLP with or
without a gate, and RMSNorms before attention and MLP, after them, or both. Names are as in the checkpoint.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.models.experts import PROJECTIONS, RoutedExperts
from pipeline.models.layers import DecoderLayer, read_input_width
from pipeline.models.routing import ExpertScores, is_correction_bias
from pipeline.models.sites import Site, base_site
from pipeline.runtime.errors import PipelineError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Architecture:
    """Names inside one decoder layer, grouped by their role in rotation and quantization.

    Attributes:
        attention_readers, mlp_readers: the linears that read the input of attention and of the MLP.
        attention_norm, mlp_norm: the norms before these linears; None if they read the residual stream directly.
        post_norms: norms between the outputs of attention and MLP and the residual stream. Their weights prevent R1
            from being merged, so in such models R1 is online or the identity.
        attention, mlp: the modules.
        attention_output, mlp_output: the linears that write to the residual stream, or to a post-norm.
        value: the linear whose output R2 rotates, head by head.
        kernel: transformers' attention implementation; eager if scores are capped or there are learned sinks, which
            sdpa cannot do.
        query_norm, key_norm: the norms of queries and keys inside attention, in families that have them.
        norms_follow_rope: whether these norms act on queries and keys that RoPE has turned, and write to the cache.
        rope_neighbours: whether RoPE turns channels (2i, 2i + 1) of a head together, and not (i, i + d/2).
        heads_first: whether the key norm reads keys as [B, heads, T, d] and not as [B, T, …].
        norm_offset: a constant that norms add to their weight before they multiply by it (1 in Gemma).
        nope_without_window: whether layers without a sliding window have no RoPE, where others have a window.
        hidden_degree: multiplying up_proj by t multiplies the input of down_proj by t ** hidden_degree: 1 where a gate
            is multiplied by it, 2 for relu squared; None if no power does.
        slides_throughout: whether `sliding_window` applies to all blocks, and not only to those in config.layer_types.
        experts, shared_expert: in blocks with a mixture of experts, the module of the routed experts, and the MLP that
            every token passes as well; None in dense families, and where there is no shared expert.
        interleaved_experts: the layout of the routed experts' tensors in full precision (models/experts.py).
        routers: the linears that read the MLP's input in full precision: the router, and the gate of the shared expert.
        router_module: the module that chooses experts; None: the first of `routers`.
        expert_scores: how the router turns its logits into scores (models/routing.py).
        float32_routers: whether the weights of `routers` are float32 in models of every dtype.
        block_prefix, embedding, final_norm, lm_head: names in the checkpoint.
    """

    attention_readers: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp_readers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    post_norms: tuple[str, ...] = ()
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_output: str = "self_attn.o_proj"
    mlp_output: str = "mlp.down_proj"
    value: str = "self_attn.v_proj"
    kernel: str = "sdpa"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    norms_follow_rope: bool = False
    rope_neighbours: bool = False
    heads_first: bool = False
    norm_offset: float = 0.0
    hidden_degree: int | None = 1
    slides_throughout: bool = False
    nope_without_window: bool = False
    experts: str | None = None
    shared_expert: str | None = None
    routers: tuple[str, ...] = ()
    router_module: str | None = None
    interleaved_experts: bool = False
    expert_scores: ExpertScores = "softmax"
    float32_routers: bool = False
    block_prefix: str = "model.layers.{index}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"

    def keeps_float32(self, name: str) -> bool:
        """Return whether a tensor is float32 in models of every dtype: small steps of it decide between experts."""
        if is_correction_bias(name):
            return True
        routers = tuple(f"{router}.weight" for router in self.routers)
        return self.float32_routers and name.endswith(routers)

    def head_names(self, quantized: bool) -> tuple[str, ...]:
        """Return the names of the tensors of lm_head: its weight, and its scales if it is quantized."""
        return (self.lm_head, f"{self.lm_head}_scale") if quantized else (self.lm_head,)

    @property
    def router(self) -> str:
        """The module that returns logits [n, E], and weights and numbers of the chosen experts [n, k]."""
        return self.router_module or self.routers[0]

    @property
    def linears(self) -> tuple[str, ...]:
        """The quantized linears of a block, in the order data flows through them."""
        return tuple(name for readers in self.site_readers.values() for name in readers)

    @property
    def linear_names(self) -> dict[str, str]:
        """Short name, as in params and reports -> name in the block: {"q_proj": "self_attn.q_proj", …}."""
        return {name.rpartition(".")[2]: name for name in self.linears}

    @property
    def site_readers(self) -> dict[str, tuple[str, ...]]:
        """Site of an input -> the linears that read it, in the order data flows through them."""
        return {
            Site.ATTENTION_INPUT: self.attention_readers,
            Site.ATTENTION_OUTPUT: (self.attention_output,),
            Site.MLP_INPUT: self.mlp_readers,
            Site.MLP_HIDDEN: (self.mlp_output,),
        }

    def site_widths(self, block: DecoderLayer) -> dict[str, int]:
        """Return the size of the last dimension at every site and linear of a plain decoder layer.

        A group size must divide it.
        """
        architecture = self.of_block(block)
        readers = {site: names[0] for site, names in architecture.site_readers.items()}
        linears = architecture.linear_names | readers
        widths = {site: read_input_width(block, name) for site, name in linears.items()}
        return widths | {Site.KEY: block.self_attn.head_dim, Site.VALUE: block.self_attn.head_dim}

    def setting_widths(self, blocks: Iterable[DecoderLayer]) -> dict[str, int]:
        """Return the widths of all sites and linears in blocks of one model, by the names that params have for them.

        Where blocks or experts differ in a width, each other width follows under a longer name
        (`shared_expert.down_proj`), for which the params of the short name count.
        """
        widths: dict[str, int] = {}
        for block in blocks:
            for site, width in self.of_block(block).site_widths(block).items():
                if widths.setdefault(base_site(site), width) != width:
                    widths[_qualify(site)] = width
        return widths

    @property
    def mlps(self) -> dict[str, tuple[str, str, str]]:
        """Site of the input of a down_proj -> the gate_proj, up_proj and down_proj of this MLP."""
        gate, up = self.mlp_readers[0], self.mlp_readers[-1]  # the same in an MLP without a gate
        return {Site.MLP_HIDDEN: (gate, up, self.mlp_output)}

    def of_block(self, block: nn.Module) -> "Architecture":
        """Return the names of a block's parts: this architecture, or `SparseArchitecture` if the block has experts."""
        if self.experts is None:
            return self
        try:
            experts = block.get_submodule(self.experts)
        except AttributeError:  # one of the dense blocks of such a family
            return self.of_experts(0, ())
        assert isinstance(experts, RoutedExperts)
        return self.of_experts(len(experts), [name for name, _ in block.named_modules()])

    def of_tensors(self, names: Collection[str]) -> "Architecture":
        """Return the same as `of_block` for the names of a block's tensors, by expert."""
        if self.experts is None:
            return self
        prefix = f"{self.experts}."
        parts = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
        numbers = [part for part in parts if part.isdigit()]  # the quantizer of their input is another part
        return self.of_experts(len(numbers), [name.rpartition(".")[0] for name in names])

    def of_experts(self, count: int, modules: Collection[str]) -> "Architecture":
        """Return the architecture of a block with `count` experts, which has these `modules`."""
        values = {field.name: getattr(self, field.name) for field in fields(Architecture)}
        if count == 0:
            return Architecture(**values | {"experts": None, "shared_expert": None, "routers": ()})
        present = set(modules)
        shared = self.shared_expert if f"{self.shared_expert}.{PROJECTIONS[0]}" in present else None
        routers = tuple(name for name in self.routers if name in present)
        return SparseArchitecture(**values | {"shared_expert": shared, "routers": routers}, expert_count=count)

    def tensor_prefix(self, index: int) -> str:
        """Return the prefix of the names of block `index` in the checkpoint: "model.layers.3."."""
        return self.block_prefix.format(index=index)

    @property
    def norms(self) -> dict[str, tuple[str, ...]]:
        """Each norm before linears -> the linears that read its output."""
        pairs = ((self.attention_norm, self.attention_readers), (self.mlp_norm, self.mlp_readers))
        return {norm: readers for norm, readers in pairs if norm is not None}

    @property
    def rotates_residual(self) -> bool:
        """Whether R1 can be merged into the weights."""
        return not self.post_norms

    def input_norm(self, site: str) -> str | None:
        """Return the name of the norm that writes `attention_input` or `mlp_input`, or None."""
        norms: dict[str, str | None] = {Site.ATTENTION_INPUT: self.attention_norm, Site.MLP_INPUT: self.mlp_norm}
        return norms[site]

    @property
    def full_precision_readers(self) -> dict[str, tuple[str, ...]]:
        """Each norm -> the linears that read its output before it is rotated online and quantized."""
        return {}

    def input_module(self, block: nn.Module, site: str) -> nn.Module:
        """Return the norm that writes `attention_input` or `mlp_input`, or else the module that reads it."""
        readers: dict[str, str] = {Site.ATTENTION_INPUT: self.attention, Site.MLP_INPUT: self.mlp}
        return block.get_submodule(self.input_norm(site) or readers[site])

    def watch_input_(
        self, block: nn.Module, site: str, replace: Callable[[ModuleT, torch.Tensor], torch.Tensor]
    ) -> None:
        """Hook `attention_input` or `mlp_input`: its readers get replace(input_module, x) in place of x."""
        module = self.input_module(block, site)
        if self.input_norm(site) is not None:
            module.register_forward_hook(functools.partial(_replace_output, replace))
        else:
            module.register_forward_pre_hook(functools.partial(_replace_input, replace), with_kwargs=True)


def _qualify(site: str) -> str:
    """Return a longer name of a site, for which `base_site` returns the short one, without the number of an expert."""
    if "." in site:
        return re.sub(r"\.\d+", "", site)
    return f"dense.{site}" if site.endswith("_proj") else f"{site}.dense"


class SparseArchitecture(Architecture):
    """Names inside a block with a mixture of experts. Built by `Architecture.of_block`.

    The routed experts share one quantizer of their input with the shared expert. The router reads the norm's output
    before that quantizer. Each expert has a quantizer of its own for the input of its down_proj, at the sites
    `mlp_hidden.experts.0` to `mlp_hidden.experts.E-1` and `mlp_hidden.shared_expert`.
    """

    def __init__(self, *, expert_count: int, **values: Any) -> None:
        super().__init__(**values)
        object.__setattr__(self, "expert_count", expert_count)
        names = [f"{self.experts}.{index}" for index in range(expert_count)]
        mlps = {}
        for name in [*names, *([self.shared_expert] if self.shared_expert else [])]:
            gate, up, down = (f"{name}.{part}" for part in PROJECTIONS)
            mlps[f"{Site.MLP_HIDDEN}.{name.removeprefix(f'{self.mlp}.')}"] = gate, up, down
        object.__setattr__(self, "_mlps", mlps)
        readers = tuple(reader for gate, up, _ in mlps.values() for reader in (gate, up))
        object.__setattr__(self, "mlp_readers", readers)

    expert_count: int
    _mlps: dict[str, tuple[str, str, str]]

    def of_block(self, block: nn.Module) -> Architecture:
        return self

    @property
    def mlps(self) -> dict[str, tuple[str, str, str]]:
        return self._mlps

    @property
    def linear_names(self) -> dict[str, str]:
        """Short name -> name in the block: {"q_proj": "self_attn.q_proj", "experts.0.gate_proj": …}."""
        return self._linear_names

    @functools.cached_property
    def _linear_names(self) -> dict[str, str]:
        attention = (*self.attention_readers, self.attention_output)
        short = {name.rpartition(".")[2]: name for name in attention}
        return short | {name.removeprefix(f"{self.mlp}."): name for name in self.linears if name not in attention}

    @property
    def site_readers(self) -> dict[str, tuple[str, ...]]:
        return self._site_readers

    @functools.cached_property
    def _site_readers(self) -> dict[str, tuple[str, ...]]:
        readers: dict[str, tuple[str, ...]] = {
            Site.ATTENTION_INPUT: self.attention_readers,
            Site.ATTENTION_OUTPUT: (self.attention_output,),
            Site.MLP_INPUT: self.mlp_readers,
        }
        return readers | {site: (down,) for site, (_, _, down) in self.mlps.items()}

    @property
    def full_precision_readers(self) -> dict[str, tuple[str, ...]]:
        return {} if self.mlp_norm is None else {self.mlp_norm: self.routers}

    def input_module(self, block: nn.Module, site: str) -> nn.Module:
        """Return the module that has the quantizer of a site: the experts for `mlp_input`, so the router has none."""
        if site == Site.MLP_INPUT:
            return block.get_submodule(str(self.experts))
        return super().input_module(block, site)

    def watch_input_(
        self, block: nn.Module, site: str, replace: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    ) -> None:
        if site != Site.MLP_INPUT:
            super().watch_input_(block, site, replace)
            return
        module = self.input_module(block, site)
        if self.shared_expert is None:
            module.register_forward_pre_hook(functools.partial(_replace_input, replace), with_kwargs=True)
            return
        hook = functools.partial(_replace_shared_input, replace, _Holder(module))
        for reader in (module, block.get_submodule(self.shared_expert)):
            reader.register_forward_pre_hook(hook)


class _Holder:
    """Refers to a module without being its parent."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


_REPLACEMENT = "_prefixquant_replacement"


# Hooks are functions of a module, because a pickled model refers to them by name.
def _replace_output(
    replace: Callable[[ModuleT, torch.Tensor], torch.Tensor],
    module: ModuleT,
    args: tuple[Any, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    return replace(module, output)


def _replace_input(
    replace: Callable[[ModuleT, torch.Tensor], torch.Tensor],
    module: ModuleT,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (replace(module, args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": replace(module, kwargs["hidden_states"])}


def _replace_shared_input(
    replace: Callable[..., torch.Tensor], holder: _Holder, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Give both readers of one tensor the same replacement, computed once.

    The first reader leaves it on the tensor, where the second one takes it. So no module holds the state of a call.
    """
    x = args[0]
    replaced = x.__dict__.pop(_REPLACEMENT, None)
    if replaced is None:
        replaced = replace(holder.module, x)
        setattr(x, _REPLACEMENT, replaced)
    return replaced, *args[1:]


# Arguments that transformers passes to an attention function, and that masks, caches and kernels account for.
_ATTENTION_ARGUMENTS = {
    "scaling",
    "dropout",
    "softcap",
    "sliding_window",
    "position_ids",
    "cache_position",
    "use_cache",
    "is_causal",
    "output_attentions",
    "attention_mask",
}

_LLAMA = Architecture()
_ROUTED: dict[str, Any] = {"experts": "mlp.experts", "routers": ("mlp.gate",)}
_POST = ("post_attention_layernorm", "post_feedforward_layernorm")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": Architecture(slides_throughout=True),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": Architecture(mlp_norm="pre_feedforward_layernorm", post_norms=_POST, kernel="eager", norm_offset=1.0),
    "gemma3_text": Architecture(
        mlp_norm="pre_feedforward_layernorm", post_norms=_POST, heads_first=True, norm_offset=1.0
    ),
    "olmo2": Architecture(attention_norm=None, mlp_norm=None, post_norms=_POST),
    "olmo3": Architecture(attention_norm=None, mlp_norm=None, post_norms=_POST),
    "exaone4": Architecture(
        attention_norm=None, mlp_norm=None, post_norms=_POST, heads_first=True, nope_without_window=True
    ),
    "seed_oss": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": Architecture(slides_throughout=True),
    "smollm3": _LLAMA,
    "hunyuan_v1_dense": Architecture(
        query_norm="query_layernorm", key_norm="key_layernorm", norms_follow_rope=True, heads_first=True
    ),
    "arcee": Architecture(mlp_readers=("mlp.up_proj",), hidden_degree=2),
    "apertus": Architecture(
        attention_norm="attention_layernorm",
        mlp_norm="feedforward_layernorm",
        mlp_readers=("mlp.up_proj",),
        hidden_degree=None,
        heads_first=True,
    ),
    "cwm": _LLAMA,
    "gemma": Architecture(norm_offset=1.0),
    "hyperclovax": Architecture(post_norms=("post_norm1", "post_norm2")),
    "vaultgemma": Architecture(mlp_norm="pre_feedforward_layernorm", kernel="eager", norm_offset=1.0),
    "mixtral": Architecture(slides_throughout=True, **_ROUTED),
    "olmoe": Architecture(**_ROUTED),
    "qwen2_moe": Architecture(
        experts="mlp.experts", shared_expert="mlp.shared_expert", routers=("mlp.gate", "mlp.shared_expert_gate")
    ),
    "qwen3_moe": Architecture(slides_throughout=True, **_ROUTED),
    "ernie4_5_moe": Architecture(
        rope_neighbours=True, shared_expert="mlp.shared_experts", float32_routers=True, **_ROUTED
    ),
    "glm4_moe": Architecture(shared_expert="mlp.shared_experts", expert_scores="sigmoid", **_ROUTED),
    "hunyuan_v1_moe": Architecture(
        query_norm="query_layernorm",
        key_norm="key_layernorm",
        norms_follow_rope=True,
        heads_first=True,
        experts="mlp.experts",
        shared_expert="mlp.shared_mlp",
        routers=("mlp.gate.wg",),
        router_module="mlp.gate",
        float32_routers=True,
    ),
    "minimax_m2": Architecture(expert_scores="sigmoid", **_ROUTED),
    "gpt_oss": Architecture(
        kernel="eager",
        hidden_degree=None,
        experts="mlp.experts",
        interleaved_experts=True,
        routers=("mlp.router",),
    ),
}
# Imported as another family that computes the same (importing/rewriting.py).
IMPORTED_AS = {
    "phi3": "mistral",
    "glm": "llama",
    "glm4": "hyperclovax",
    "helium": "llama",
    "ernie4_5": "llama",
    "granite": "llama",
    "granitemoehybrid": "llama",
    "granitemoe": "mixtral",
}


class UnsupportedModelError(PipelineError):
    """The model's family, or a setting in its config, is not supported. The message lists the supported ones."""


def find_architecture(config: PreTrainedConfig) -> Architecture:
    """Return the architecture of a transformers config.

    Raises:
        UnsupportedModelError: the family is not supported. The message lists those that are.
    """
    return find_family(config.model_type)


def find_family(model_type: str | None) -> Architecture:
    """Return the architecture of a family by `model_type` of a config.json. Raises as `find_architecture`."""
    family = IMPORTED_AS.get(model_type or "", model_type or "")
    if family not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES | IMPORTED_AS))
        raise UnsupportedModelError(f"model_type={model_type!r} is not supported. Supported are: {supported}")
    return ARCHITECTURES[family]


def count_experts(config: PreTrainedConfig) -> int:
    """Return how many routed experts a block with experts has."""
    names = ("num_experts", "num_local_experts")
    return next(getattr(config, name) for name in names if hasattr(config, name))


def find_logit_cap(config: PreTrainedConfig) -> float | None:
    """Return the bound of a model's soft cap on its logits (cap tanh(z / cap)), or None."""
    return getattr(config, "final_logit_softcapping", None)


def find_sliding_window(config: PreTrainedConfig, block: DecoderLayer) -> int | None:
    """Return how many positions a position of a decoder layer attends to, itself included; None: all before it."""
    if find_architecture(config).slides_throughout:
        return config.sliding_window
    attention = block.self_attn
    return getattr(attention, "sliding_window", None) if getattr(attention, "is_sliding", True) else None


def uses_rope(config: PreTrainedConfig, block: DecoderLayer) -> bool:
    """Return whether RoPE lies between the module that writes a layer's keys (`find_key_source`) and the cache.

    Some families have no RoPE in some layers. In others a norm follows RoPE, and this norm writes the keys.
    """
    attention, architecture = block.self_attn, find_architecture(config)
    if architecture.norms_follow_rope:
        return False
    if architecture.nope_without_window:
        return config.sliding_window is None or find_sliding_window(config, block) is not None
    return bool(getattr(attention, "use_rope", True))


def find_narrowest_window(config: PreTrainedConfig, blocks: Iterable[DecoderLayer]) -> int | None:
    """Return the smallest sliding window of a model's decoder layers; None: no layer slides."""
    windows = (find_sliding_window(config, block) for block in blocks)
    return min((window for window in windows if window is not None), default=None)


def find_widest_window(config: PreTrainedConfig, blocks: Iterable[DecoderLayer]) -> int | None:
    """Return the largest sliding window of a model's decoder layers; None: no layer slides."""
    windows = (find_sliding_window(config, block) for block in blocks)
    return max((window for window in windows if window is not None), default=None)


def check_attention_arguments(arguments: Mapping[str, object], computed: Collection[str] = ()) -> None:
    """Check the keyword arguments of an attention function that does not compute all that transformers may pass.

    Args:
        computed: further arguments that this function computes, such as `s_aux`, the learned sinks of some families.

    Raises:
        UnsupportedModelError: another one would have an effect.
    """
    known = {*_ATTENTION_ARGUMENTS, *computed}
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in known)
    if unknown:
        raise UnsupportedModelError(
            f"attention gets {', '.join(unknown)}, which is not supported: the results would silently lack it (s_aux "
            "are learned attention sinks)."
        )


def find_rope_limit(config: PreTrainedConfig) -> int | None:
    """Return the text length at which a model's RoPE changes its frequencies (LongRoPE and dynamic RoPE), or None.

    A text must not exceed it. Otherwise the keys in a cache, also the prefix's, would keep the old frequencies.
    """
    nested = [value for value in config.rope_parameters.values() if isinstance(value, dict)]
    for rope in nested or [config.rope_parameters]:
        if rope.get("rope_type") == "longrope":
            return rope["original_max_position_embeddings"]
        if rope.get("rope_type") == "dynamic":
            return config.max_position_embeddings
    return None


def find_max_positions(config: PreTrainedConfig) -> int:
    """Return the longest text that a model can read, prefix included."""
    limit = find_rope_limit(config)
    return config.max_position_embeddings if limit is None else min(limit, config.max_position_embeddings)


def check_rope(config: PreTrainedConfig, positions: int) -> None:
    """Check that a text of this many positions, prefix included, stays within `find_rope_limit`.

    Raises:
        UnsupportedModelError: it does not.
    """
    limit = find_rope_limit(config)
    if limit is not None and positions > limit:
        raise UnsupportedModelError(
            f"{positions} positions (prefix + window) exceed {limit}, beyond which this model's RoPE changes its "
            "frequencies. Keys in a cache, those of the prefix too, would keep the old ones. Use windows of at most "
            f"{limit} tokens less the prefix."
        )


def check_window(config: PreTrainedConfig, positions: int) -> None:
    """Check that windows stay within the positions of a model, and within `find_rope_limit`.

    Args:
        config: a transformers config.
        positions: prefix tokens + window length.

    Raises:
        UnsupportedModelError: they do not.
    """
    if positions > config.max_position_embeddings:
        raise UnsupportedModelError(
            f"{positions} positions (prefix + window) exceed max_position_embeddings={config.max_position_embeddings}"
            " of this model. Use shorter windows."
        )
    check_rope(config, positions)
