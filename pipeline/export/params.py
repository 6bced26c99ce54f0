"""The group `export` of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.runtime.params import Group


class ExportParams(Group):
    max_shard_size: Annotated[str, Field(pattern=r"^\d+(KB|MB|GB)$")]
    formats: list[Literal["compressed-tensors", "peft"]]
    drop: list[Literal["activations", "keys", "values", "prefix"]]
