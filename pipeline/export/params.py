"""The group `export` of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.runtime.params import Group


class ExportParams(Group):
    max_shard_size: Annotated[str, Field(pattern=r"^\d+(KB|MB|GB)$")]
    formats: list[Literal["compressed-tensors", "peft", "gguf"]]
    drop: list[Literal["activations", "keys", "values", "prefix"]]


def find_misfits(formats: list[str], sliding_window: int | None) -> list[str]:
    """Formats that cannot carry a model whose layers slide (None: none does): a line for each."""
    if "peft" not in formats or sliding_window is None:
        return []
    return [
        f"export.formats: the model has layers that slide (sliding_window={sliding_window}), and the prefix of a peft "
        "adapter slides with them; remove peft"
    ]
