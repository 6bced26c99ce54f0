"""Routed experts of a mixture-of-experts block: their module, and the layouts of their tensors.

transformers holds the experts of a block as two 3-D parameters, which hooks on linears never reach. `route_experts_`
replaces this module by `RoutedExperts`, in which each expert has three linears of its own. So all code for the
linears of a dense block works for experts too. Router, shared expert and the block's forward do not change, except that
`SharedMixture` hands one tensor to all experts where shared ones are called `shared_experts` or `shared_mlp`.

The tensors of E experts have three layouts (I is the width of an expert, D the hidden size):

    fused       mlp.experts.gate_up_proj [E, 2I, D]        transformers' own; a model in full precision on disk
                mlp.experts.down_proj [E, D, I]
    interleaved mlp.experts.gate_up_proj [E, D, 2I]        the same in gpt_oss: transposed, gate and up by turns
                mlp.experts.down_proj [E, I, D]
                mlp.experts.gate_up_proj_bias [E, 2I], down_proj_bias [E, D]
    by expert   mlp.experts.3.gate_proj.weight [I, D], …   in memory: the names inside a block
    stacked     mlp.experts.gate_proj.weight [E, I, D], …  a quantized model on disk
"""

import re
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import nn
from transformers.integrations import moe

from pipeline.runtime.errors import PipelineError

EAGER = "eager"  # transformers' implementation of experts that computes in every dtype
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_SHARED = ("shared_experts", "shared_mlp")
_BY_EXPERT = re.compile(r"(?P<module>.*\bexperts)\.(?P<expert>\d+)\.(?P<rest>.+)")
_STACKED = re.compile(r"(?P<module>.*\bexperts)\.(?P<rest>(?:gate_proj|up_proj|down_proj)\..+)")
_FUSED = re.compile(r"(?P<module>.*\bexperts)\.(?P<kind>gate_up_proj|down_proj)(?P<bias>_bias)?")
Tensors = dict[str, torch.Tensor]


class UnsupportedExpertsError(PipelineError):
    """The experts of a family compute something that this project does not. The message names it."""


class Expert(nn.Module):
    """The three linears of one expert: gate_proj and up_proj [I, D], down_proj [D, I]."""

    def __init__(self, hidden: int, inner: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.up_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=bias, dtype=dtype)


class ProductGate(nn.Module):
    """activation(gate) * up."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return the input of down_proj, [n, I], from the outputs of gate_proj and up_proj."""
        return self.activation(gate) * up


class ClampedGate(nn.Module):
    """gate sigmoid(alpha gate) (up + 1), of gates up to a limit and ups within it (gpt_oss)."""

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return the input of down_proj, [n, I], from the outputs of gate_proj and up_proj."""
        gate = gate.clamp(max=self.limit)
        return (up.clamp(min=-self.limit, max=self.limit) + 1) * (gate * torch.sigmoid(gate * self.alpha))


class _FusedExperts(nn.Module):
    """The type of transformers' experts. No object is an instance of it. gpt_oss has `alpha` and no `act_fn`."""

    gate_up_proj: nn.Parameter
    act_fn: nn.Module
    alpha: float
    limit: float
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]


class RoutedExperts(nn.Module):
    """Experts "0" to "E - 1", each of which computes down_proj(combine(gate_proj(x), up_proj(x))).

    An expert runs on the tokens that the router has sent to it, and only on those.

    Attributes:
        combine: the gate, which has no parameters.
        hits: how many tokens each of the E experts has computed since the block was loaded.
        watchers: functions that are called before each call of a down_proj with the expert, its tokens [m], and the
            input of down_proj before R4 [m, I].
    """

    def __init__(self, experts: nn.Module) -> None:
        """Take the place of transformers' experts, with uninitialised linears of the same dtype on the same device.

        Raises:
            UnsupportedExpertsError: these experts are not gated MLPs of a known kind.
        """
        super().__init__()
        combine = _find_gate(experts)
        fused = cast(_FusedExperts, experts)
        gate_up, bias = fused.gate_up_proj, getattr(experts, "has_bias", False)
        count, double, hidden = (gate_up.mT if getattr(experts, "is_transposed", False) else gate_up).shape
        with torch.device(gate_up.device):
            for index in range(count):
                self.add_module(str(index), Expert(hidden, double // 2, bias, gate_up.dtype))
        self.combine = combine
        self.hits = [0] * count
        self.watchers: list[Callable[[int, torch.Tensor, torch.Tensor], None]] = []

    def __len__(self) -> int:
        return len(self.hits)

    def expert(self, index: int) -> Expert:
        """Return an expert by its number."""
        expert = self.get_submodule(str(index))
        assert isinstance(expert, Expert)
        return expert

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, as transformers calls its own experts.

        Args:
            hidden_states: [n, D].
            top_k_index, top_k_weights: [n, k], the experts that the router has chosen for each token.
        """
        output = torch.zeros_like(hidden_states)
        for index, tokens, places in group_tokens(top_k_index, len(self)):
            self.hits[index] += len(tokens)
            inner = self.compute_inner(index, hidden_states[tokens])
            for watch in self.watchers:
                watch(index, tokens, inner)
            y = self.expert(index).down_proj(inner)
            y = y * top_k_weights[tokens, places].unsqueeze(-1)
            output.index_add_(0, tokens, y.to(output.dtype))
        return output

    def compute_inner(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return the input of an expert's down_proj, [n, I], before R4, for tokens x [n, D]."""
        expert = self.expert(index)
        return self.combine(expert.gate_proj(x), expert.up_proj(x))


class SharedMixture(nn.Module):
    """The router, routed and shared experts of ernie4_5_moe, glm4_moe and hunyuan_v1_moe, which read one tensor [n, D].

    In transformers' modules of the last two, routed and shared experts read two views of it, so that a quantizer would
    get all tokens twice. As in qwen2_moe, the shared experts run first. Outputs are the same.
    """

    def __init__(self, mixture: nn.Module, shared: str) -> None:
        """Take over the modules of transformers' mixture; `shared` is the name of the shared experts."""
        super().__init__()
        self.gate = mixture.get_submodule("gate")
        self.experts = mixture.get_submodule("experts")
        self.add_module(shared, mixture.get_submodule(shared))
        self.shared_name = shared

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the sum of the experts' outputs for hidden states [..., D]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, chosen = self.gate(x)
        shared = self.get_submodule(self.shared_name)(x)
        return (self.experts(x, chosen, weights) + shared).view_as(hidden_states)


def _find_gate(experts: nn.Module) -> nn.Module:
    """Return the gate of transformers' experts. Raise UnsupportedExpertsError if they are of an unknown kind."""
    fused, gate = cast(_FusedExperts, experts), getattr(type(experts), "_apply_gate", None)
    transposed, interleaved = getattr(experts, "is_transposed", False), not getattr(experts, "is_concatenated", True)
    clamped = ClampedGate(fused.alpha, fused.limit) if interleaved and hasattr(experts, "alpha") else None
    if clamped is not None:
        gate_up = torch.linspace(-3, 3, 32) * clamped.limit
        if not torch.equal(clamped(gate_up[::2], gate_up[1::2]), fused._apply_gate(gate_up)):
            clamped = None
    reasons = {
        "their weights are transposed": transposed and not interleaved,
        "they have no gate": not getattr(experts, "has_gate", True),
        "a norm follows each expert": getattr(experts, "has_post_expert_norm", False),
        "gate and up are interleaved": interleaved and not transposed,
        "their gate is neither activation(gate) * up nor that of gpt_oss": clamped is None
        and gate is not moe._default_apply_gate,
    }
    if wrong := [reason for reason, holds in reasons.items() if holds]:
        name = type(experts).__name__
        raise UnsupportedExpertsError(f"{name}: {'; '.join(wrong)}. Such experts are not supported. Use another model.")
    return ProductGate(fused.act_fn) if clamped is None else clamped


def group_tokens(top_k_index: torch.Tensor, count: int) -> Iterable[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (expert, its tokens [m], their places among the k choices [m]) for each expert that has any, ascending.

    Tokens of an expert are in ascending order: [[1, 0], [1, 2]] -> (0, [0], [1]), (1, [0, 1], [0, 0]), (2, [1], [1]).
    """
    chosen = top_k_index.flatten()
    order = torch.argsort(chosen, stable=True)
    sizes = torch.bincount(chosen, minlength=count).tolist()
    for index, entries in enumerate(order.split(sizes)):
        if len(entries):
            yield index, entries // top_k_index.shape[1], entries % top_k_index.shape[1]


def route_experts_(block: nn.Module, name: str) -> None:
    """Replace transformers' experts `name` of a block by `RoutedExperts`, if the block has them."""
    parent, _, child = name.rpartition(".")
    experts = getattr(block.get_submodule(parent), child, None)
    if experts is not None and not isinstance(experts, RoutedExperts):
        block.set_submodule(name, RoutedExperts(experts))
        mixture = block.get_submodule(parent)
        for shared in _SHARED:
            if getattr(mixture, shared, None) is not None:  # ernie4_5_moe may have none
                block.set_submodule(parent, SharedMixture(mixture, shared))


def split_experts(tensors: Tensors, interleaved: bool = False) -> Tensors:
    """Return tensors of a block by expert; other tensors are passed on. Accepts all layouts.

    Args:
        interleaved: the layout of fused tensors. Otherwise results are views.
    """
    result: Tensors = {}
    for name, tensor in tensors.items():
        fused, stacked = _FUSED.fullmatch(name), _STACKED.fullmatch(name)
        if stacked is not None:
            result |= _number(stacked["module"], stacked["rest"], tensor)
        elif fused is None:
            result[name] = tensor
        else:
            parameter = "bias" if fused["bias"] else "weight"
            rows = tensor.mT if interleaved and parameter == "weight" else tensor  # [E, out, in] or [E, out]
            parts = {"down_proj": rows}
            if fused["kind"] == "gate_up_proj":
                gate, up = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, dim=1)
                parts = {"gate_proj": gate, "up_proj": up}
            for projection, part in parts.items():
                part = part.contiguous() if interleaved else part
                result |= _number(fused["module"], f"{projection}.{parameter}", part)
    return result


def _number(module: str, rest: str, tensor: torch.Tensor) -> Tensors:
    return {f"{module}.{index}.{rest}": part for index, part in enumerate(tensor)}


def stack_experts(tensors: Tensors, interleaved: bool = False) -> Tensors:
    """Return the tensors of a block with all experts stacked, [E, …], or fused if they are only floats.

    Other tensors are passed on.

    Args:
        interleaved: the layout of fused tensors.

    Raises:
        ValueError: an expert lacks a tensor that another one has.
    """
    result: Tensors = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _BY_EXPERT.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            stacks.setdefault(f"{match['module']}.{match['rest']}", {})[int(match["expert"])] = tensor
    count = max((index + 1 for parts in stacks.values() for index in parts), default=0)
    for name, parts in stacks.items():
        if len(parts) != count:
            raise ValueError(f"{name}: {len(parts)} of {count} experts have it")
        result[name] = torch.stack([parts[index] for index in range(count)])
    return _fuse(result, interleaved) if stacks else result


def _fuse(tensors: Tensors, interleaved: bool) -> Tensors:
    """Return stacked tensors as transformers names them if the experts have float weights, maybe biases, alone."""
    kinds = {match["rest"]: match["module"] for name in tensors if (match := _STACKED.fullmatch(name))}
    parameters = {rest.partition(".")[2] for rest in kinds}
    complete = {f"{part}.{parameter}" for part in PROJECTIONS for parameter in parameters}
    if kinds.keys() != complete or parameters not in ({"weight"}, {"weight", "bias"}):
        return tensors
    module, fused = next(iter(kinds.values())), dict[str, torch.Tensor]()
    for parameter in sorted(parameters):
        gate, up, down = (tensors.pop(f"{module}.{part}.{parameter}") for part in PROJECTIONS)
        gate_up = torch.stack((gate, up), dim=2).flatten(1, 2) if interleaved else torch.cat((gate, up), dim=1)
        for name, part in (("gate_up_proj", gate_up), ("down_proj", down)):
            turned = part.mT.contiguous() if interleaved and parameter == "weight" else part
            fused[f"{module}.{name}{'_bias' if parameter == 'bias' else ''}"] = turned
    return tensors | fused
