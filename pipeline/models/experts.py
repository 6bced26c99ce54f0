"""Routed experts of a mixture-of-experts block: their module, and the layouts of their tensors.

transformers holds the experts of a block as two 3-D parameters, which hooks on linears never reach. `route_experts_`
replaces this module by `RoutedExperts`, in which each expert has three linears of its own. So all code for the
linears of a dense block works for experts too. Router, shared expert and the block's forward do not change, except that
`SharedMixture` hands one tensor to the experts of glm4_moe.

The tensors of E experts have three layouts (I is the width of an expert, D the hidden size):

    fused       mlp.experts.gate_up_proj [E, 2I, D]        transformers' own; a model in full precision on disk
                mlp.experts.down_proj [E, D, I]
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
_BY_EXPERT = re.compile(r"(?P<module>.*\bexperts)\.(?P<expert>\d+)\.(?P<rest>.+)")
_STACKED = re.compile(r"(?P<module>.*\bexperts)\.(?P<rest>(?:gate_proj|up_proj|down_proj)\..+)")
_FUSED = re.compile(r"(?P<module>.*\bexperts)\.(?P<kind>gate_up_proj|down_proj)")
Tensors = dict[str, torch.Tensor]


class UnsupportedExpertsError(PipelineError):
    """The experts of a family compute something that this project does not. The message names it."""


class Expert(nn.Module):
    """The three linears of one expert, without biases: gate_proj and up_proj [I, D], down_proj [D, I]."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=False, dtype=dtype)


class _FusedExperts(nn.Module):
    """The type of transformers' plain experts. No object is an instance of it."""

    gate_up_proj: nn.Parameter
    act_fn: nn.Module


class RoutedExperts(nn.Module):
    """Experts "0" to "E - 1", each of which computes down_proj(activate(gate_proj(x)) * up_proj(x)).

    An expert runs on the tokens that the router has sent to it, and only on those.

    Attributes:
        hits: how many tokens each of the E experts has computed since the block was loaded.
        watchers: functions that are called before each call of a down_proj with the expert, its tokens [m], and the
            input of down_proj before R4 [m, I].
    """

    def __init__(self, experts: nn.Module) -> None:
        """Take the place of transformers' experts, with uninitialised linears of the same dtype on the same device.

        Raises:
            UnsupportedExpertsError: these experts are not plain gated MLPs.
        """
        super().__init__()
        _check_plain(experts)
        fused = cast(_FusedExperts, experts)
        count, double, hidden = fused.gate_up_proj.shape
        with torch.device(fused.gate_up_proj.device):
            for index in range(count):
                self.add_module(str(index), Expert(hidden, double // 2, fused.gate_up_proj.dtype))
        self.activate = fused.act_fn
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
        return self.activate(expert.gate_proj(x)) * expert.up_proj(x)


class SharedMixture(nn.Module):
    """The router, the routed experts and the shared experts of glm4_moe, which all read one tensor [n, D].

    In transformers' own module, routed and shared experts read two views of it, so that a quantizer would get all
    tokens twice. As in qwen2_moe, the shared experts run first. Outputs are the same.
    """

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.gate = mixture.get_submodule("gate")
        self.experts = mixture.get_submodule("experts")
        self.shared_experts = mixture.get_submodule("shared_experts")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the sum of the experts' outputs for hidden states [..., D]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, chosen = self.gate(x)
        shared = self.shared_experts(x)
        return (self.experts(x, chosen, weights) + shared).view_as(hidden_states)


def _check_plain(experts: nn.Module) -> None:
    name, gate = type(experts).__name__, getattr(type(experts), "_apply_gate", None)
    reasons = {
        "their weights are transposed": getattr(experts, "is_transposed", False),
        "they have biases": getattr(experts, "has_bias", False),
        "they have no gate": not getattr(experts, "has_gate", True),
        "a norm follows each expert": getattr(experts, "has_post_expert_norm", False),
        "gate and up are interleaved": not getattr(experts, "is_concatenated", True),
        "their gate is not activation(gate) * up": gate is not moe._default_apply_gate,
    }
    if wrong := [reason for reason, holds in reasons.items() if holds]:
        raise UnsupportedExpertsError(f"{name}: {'; '.join(wrong)}. Such experts are not supported. Use another model.")


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
        if hasattr(mixture, "shared_experts"):
            block.set_submodule(parent, SharedMixture(mixture))


def split_experts(tensors: Tensors) -> Tensors:
    """Return tensors of a block by expert, as views; other tensors are passed on. Accepts all three layouts."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        fused, stacked = _FUSED.fullmatch(name), _STACKED.fullmatch(name)
        if stacked is not None:
            result |= _number(stacked["module"], stacked["rest"], tensor)
        elif fused is None:
            result[name] = tensor
        elif fused["kind"] == "down_proj":
            result |= _number(fused["module"], "down_proj.weight", tensor)
        else:
            gate, up = tensor.chunk(2, dim=1)
            result |= _number(fused["module"], "gate_proj.weight", gate)
            result |= _number(fused["module"], "up_proj.weight", up)
    return result


def _number(module: str, rest: str, tensor: torch.Tensor) -> Tensors:
    return {f"{module}.{index}.{rest}": part for index, part in enumerate(tensor)}


def stack_experts(tensors: Tensors) -> Tensors:
    """Return the tensors of a block with all experts stacked, [E, …], or fused if they are only floats.

    Other tensors are passed on.

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
    return _fuse(result) if stacks else result


def _fuse(tensors: Tensors) -> Tensors:
    """Return stacked tensors as transformers names them if the experts have float weights and nothing else."""
    kinds = {match["rest"]: match["module"] for name in tensors if (match := _STACKED.fullmatch(name))}
    if kinds.keys() != {f"{part}.weight" for part in PROJECTIONS}:
        return tensors
    module = next(iter(kinds.values()))
    gate, up, down = (tensors.pop(f"{module}.{part}.weight") for part in PROJECTIONS)
    return tensors | {f"{module}.gate_up_proj": torch.cat((gate, up), dim=1), f"{module}.down_proj": down}
