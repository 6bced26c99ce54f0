"""The groups of params.yaml about the prefix: `prefix_search`, `prefix_training` and `prefix`."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.runtime.params import Group, Number


class PrefixSearchParams(Group):
    choose: Literal["benefit", "threshold"]
    site: Literal["down_proj_input", "block_output"]
    outlier_threshold: Annotated[Number, Field(gt=1)]
    start_token_counts: bool


class PrefixLossWeights(Group):
    outlier: Annotated[Number, Field(ge=0)]
    smoothness: Annotated[Number, Field(ge=0)]
    quantization: Annotated[Number, Field(ge=0)]
    l2: Annotated[Number, Field(ge=0)]
    var: Annotated[Number, Field(ge=0)]
    diversity: Annotated[Number, Field(ge=0)]
    magnitude: Annotated[Number, Field(ge=0)]
    kl: Annotated[Number, Field(ge=0)]


class PrefixTrainingParams(Group):
    enabled: bool
    length: Annotated[int, Field(ge=1)] | None
    loss_type: Literal["quantization", "outlier", "l2", "var"]
    simulate: bool
    weights: PrefixLossWeights
    target_layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None
    outlier_threshold: Annotated[Number, Field(gt=1)]
    bits: Literal[2, 3, 4, 5, 6, 7, 8]
    learning_rate: Annotated[Number, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0)]
    batch_size: Annotated[int, Field(ge=1)]
    clip_grad: Annotated[Number, Field(gt=0)]
    early_stop: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    max_kl: Annotated[Number, Field(gt=0)] | None


class PrefixParams(Group):
    use: Literal["none", "found", "trained", "discretised"]
    length: Annotated[int, Field(ge=1)] | None
