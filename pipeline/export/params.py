"""The group `export` of params.yaml."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from pipeline.runtime.params import Group


class OnnxParams(Group):
    """The graph of the format onnx."""

    cache: Literal["float32", "integer"] = "float32"
    widest_rotation: Annotated[int, Field(ge=0)] = 0
    sequence_length: Annotated[int, Field(ge=1)] | None = None
    cache_length: Annotated[int, Field(ge=1)] | None = None


class ExportParams(Group):
    """Shards of the exported folder, further formats, and the parts that these may leave out."""

    max_shard_size: Annotated[str, Field(pattern=r"^\d+(KB|MB|GB)$")] = "5GB"
    formats: list[Literal["compressed-tensors", "peft", "gguf", "onnx"]] = Field(default_factory=list)
    drop: list[Literal["activations", "keys", "values", "prefix"]] = Field(default_factory=list)
    onnx: OnnxParams = OnnxParams()


def find_contradictions(params: ExportParams) -> list[str]:
    """Return a line for each combination of settings that contradicts itself, whatever the model."""
    lengths = {"sequence_length": params.onnx.sequence_length, "cache_length": params.onnx.cache_length}
    missing = [name for name, length in lengths.items() if length is None]
    if len(missing) != 1:
        return []
    return [f"export.onnx.{missing[0]}: a graph has static sizes for both lengths, or for none. Set it, or empty both."]


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
