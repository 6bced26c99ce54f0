"""The group `rotation` of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.models.sites import Site
from pipeline.runtime.params import FloatDtype, Group

R1Mode = Literal["online", "hadamard", "block_hadamard", "random", "identity"]
R2Mode = Literal["hadamard", "block_hadamard", "random", "identity"]
R3Mode = Literal["hadamard", "identity"]
R4Mode = Literal["hadamard", "block_hadamard", "identity"]
R5Mode = Literal["hadamard", "identity"]


class RotationParams(Group):
    """How each of R1 to R5 is made; `identity` leaves one out."""

    r1: R1Mode = "online"
    r2: R2Mode = "hadamard"
    r3: R3Mode = "hadamard"
    r4: R4Mode = "hadamard"
    r5: R5Mode = "hadamard"
    online_signs: bool = False
    block_size: Annotated[int, Field(ge=2)] = 16
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: FloatDtype = "float32"


def find_contradictions(rotation: RotationParams) -> list[str]:
    """Return a line for each setting that has no effect."""
    before_r5 = rotation.r5 != "identity" and rotation.r2 not in ("random", "identity")
    if not rotation.online_signs or rotation.r1 == "online" or before_r5:
        return []
    return [
        "rotation.online_signs=true: no online rotation has a place for signs before it. Set rotation.r1: online, or "
        "rotation.r5 and r2: hadamard."
    ]


def find_misfits(rotation: RotationParams, widths: dict[str, int]) -> list[str]:
    """Return a line for each rotation in blocks whose `block_size` does not divide its width.

    Args:
        widths: quantizer sites of a block -> the size of their last dimension.
    """
    sites = {"r1": Site.ATTENTION_INPUT, "r2": Site.VALUE, "r4": Site.MLP_HIDDEN}
    return [
        f"rotation.block_size={rotation.block_size}: does not divide {widths[site]}, the width that {name} rotates. "
        f"Use a divisor, or rotation.{name}: hadamard."
        for name, site in sites.items()
        if getattr(rotation, name) == "block_hadamard" and widths[site] % rotation.block_size
    ]
