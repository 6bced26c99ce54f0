"""The group `export` of params.yaml."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from pipeline.runtime.params import Group


class ExportParams(Group):
    """Shards of the exported folder, further formats, and what these may leave out."""

    max_shard_size: Annotated[str, Field(pattern=r"^\d+(KB|MB|GB)$")] = "5GB"
    formats: list[Literal["compressed-tensors", "peft", "gguf"]] = Field(default_factory=list)
    drop: list[Literal["activations", "keys", "values", "prefix"]] = Field(default_factory=list)


def find_misfits(formats: Sequence[str], sliding_window: int | None) -> list[str]:
    """Return a message for each format that cannot hold the model.

    Args:
        sliding_window: the narrowest window of a sliding layer, None if no layer slides.
    """
    if "peft" not in formats or sliding_window is None:
        return []
    return [
        f"export.formats: the model has layers that slide (sliding_window={sliding_window}). PEFT would count the "
        "padding between prefix and text, and the prefix would leave the window too early. Remove peft."
    ]
