"""The group `rotation` of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.models.sites import Site
from pipeline.runtime.params import FloatDtype, Group

OfflineRotation = Literal["hadamard", "block_hadamard", "random", "identity"]
OnlineRotation = Literal["hadamard", "identity"]


class RotationParams(Group):
    r1: Literal["online", "hadamard", "block_hadamard", "random", "identity"]
    r2: OfflineRotation
    r3: OnlineRotation
    r4: Literal["hadamard", "block_hadamard", "identity"]
    r5: OnlineRotation
    online_signs: bool
    block_size: Annotated[int, Field(ge=2)]
    seed: Annotated[int, Field(ge=0)]
    dtype: FloatDtype


def find_contradictions(rotation: RotationParams) -> list[str]:
    """Values that have nothing to act on: a line for each."""
    in_front_of_r5 = rotation.r5 != "identity" and rotation.r2 not in ("random", "identity")
    if not rotation.online_signs or rotation.r1 == "online" or in_front_of_r5:
        return []
    return [
        "rotation.online_signs=true: there is nothing they could stand in front of; set rotation.r1: online, or "
        "rotation.r5 and r2: hadamard"
    ]


def find_misfits(rotation: RotationParams, widths: dict[str, int]) -> list[str]:
    """Blocks that do not divide what they rotate: a line for each.

    Args:
        widths: quantizer sites of a block -> the size of their last dimension.
    """
    sites = {"r1": Site.ATTENTION_INPUT, "r2": Site.VALUE, "r4": Site.MLP_HIDDEN}
    return [
        f"rotation.block_size={rotation.block_size} does not divide {widths[site]}, which {name} rotates; use a "
        f"divisor, or rotation.{name}: hadamard"
        for name, site in sites.items()
        if getattr(rotation, name) == "block_hadamard" and widths[site] % rotation.block_size
    ]
