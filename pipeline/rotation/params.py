"""The group `rotation` of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.runtime.params import FloatDtype, Group

OfflineRotation = Literal["hadamard", "random", "identity"]
OnlineRotation = Literal["hadamard", "identity"]


class RotationParams(Group):
    r1: Literal["online", "hadamard", "random", "identity"]
    r2: OfflineRotation
    r3: OnlineRotation
    r4: OnlineRotation
    seed: Annotated[int, Field(ge=0)]
    dtype: FloatDtype
