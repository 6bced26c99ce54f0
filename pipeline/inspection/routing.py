"""The experts that the routers of a model choose, and how often a changed model chooses the same.

The router decides in full precision, but it reads hidden states that quantized blocks have computed. A token whose set
of experts differs from the original's is computed by other weights. So the share of tokens with the same set, by
block, tells how much of the error comes from routing. The order of the k experts does not count.
"""

from types import TracebackType
from typing import Any

import torch
from torch import nn

from pipeline.models.architectures import Architecture

NO_EXPERT = -1  # of tokens in blocks without experts


class RoutingProbe:
    """Records the choices of a block's router inside its context: `with RoutingProbe(block, architecture) as probe`."""

    def __init__(self, block: nn.Module, architecture: Architecture) -> None:
        architecture = architecture.of_block(block)
        self._router = block.get_submodule(architecture.router) if architecture.routers else None
        self._chosen: list[torch.Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "RoutingProbe":
        if self._router is not None:
            self._handles.append(self._router.register_forward_hook(self._record))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _record(self, module: nn.Module, args: tuple[torch.Tensor], output: tuple[torch.Tensor, ...]) -> None:
        # Routers return logits and weights first. Sets are compared, so their order is made the same.
        self._chosen.append(output[2].sort(-1).values.to("cpu", torch.int32))

    def read(self, windows: int, content: int) -> torch.Tensor | None:
        """Return the sorted numbers of the chosen experts and forget them.

        Args:
            windows: how many windows have run since the last call, N.
            content: how many tokens at the end of each window count, T.

        Returns:
            [N, T, k] int32; None for a block without experts.
        """
        if not self._chosen:
            return None
        chosen = torch.cat(self._chosen)
        self._chosen.clear()
        return chosen.view(windows, -1, chosen.shape[-1])[:, -content:]


def stack_choices(blocks: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the choices of all blocks, [N, T, L, k] int32, with `NO_EXPERT` in dense blocks; None without experts."""
    sparse = next((choice for choice in blocks if choice is not None), None)
    if sparse is None:
        return None
    nothing = torch.full_like(sparse, NO_EXPERT)
    return torch.stack([nothing if choice is None else choice for choice in blocks], dim=2)


def measure_agreement(choices: torch.Tensor, original: torch.Tensor) -> list[float | None]:
    """Return, for each block, the share of tokens with the same experts; None for blocks without experts.

    Args:
        choices, original: [N, T, L, k] of two models on the same windows.
    """
    same = (choices == original).all(-1).double().mean((0, 1)).tolist()
    sparse = (original != NO_EXPERT).any(-1).any(0).any(0).tolist()
    return [share if counts else None for share, counts in zip(same, sparse, strict=True)]


def average_agreement(shares: list[float | None]) -> float:
    """Return the mean of `measure_agreement` over the blocks that have experts."""
    present = [share for share in shares if share is not None]
    return sum(present) / len(present)


def count_tokens(choices: torch.Tensor, experts: int) -> torch.Tensor:
    """Return how many tokens each expert of each block gets, [L, E], for choices [N, T, L, k]."""
    by_block = choices.permute(2, 0, 1, 3).flatten(1)
    return torch.stack([torch.bincount(block[block >= 0], minlength=experts) for block in by_block])


Choices = dict[str, torch.Tensor | None]  # corpus -> [N, T, L, k], or None for a model without experts


def describe_routing(choices: Choices, original: Choices) -> dict[str, Any]:
    """Return {"router_agreement": {corpus: average}} for the metrics; {} for a model without experts."""
    agreement = {}
    for corpus, chosen in choices.items():
        expected = original.get(corpus)
        if chosen is not None and expected is not None:
            agreement[corpus] = round(average_agreement(measure_agreement(chosen, expected)), 4)
    return {"router_agreement": agreement} if agreement else {}
