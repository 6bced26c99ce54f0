"""The groups of params.yaml about the prefix: `prefix_search`, `prefix_training` and `prefix`."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.runtime.params import Group, Number


class PrefixSearchParams(Group):
    choose: Literal["benefit", "threshold"] = "benefit"
    site: Literal["down_proj_input", "block_output"] = "down_proj_input"
    outlier_threshold: Annotated[Number, Field(gt=1)] = 64.0
    start_token_counts: bool = False


class PrefixLossWeights(Group):
    outlier: Annotated[Number, Field(ge=0)] = 1.0
    smoothness: Annotated[Number, Field(ge=0)] = 0.1
    quantization: Annotated[Number, Field(ge=0)] = 0.0
    l2: Annotated[Number, Field(ge=0)] = 1.0
    var: Annotated[Number, Field(ge=0)] = 1.0
    diversity: Annotated[Number, Field(ge=0)] = 0.05
    magnitude: Annotated[Number, Field(ge=0)] = 0.01
    kl: Annotated[Number, Field(ge=0)] = 1.0


class PrefixTrainingParams(Group):
    enabled: bool = False
    length: Annotated[int, Field(ge=1)] | None = 8
    loss_type: Literal["quantization", "outlier", "l2", "var"] = "quantization"
    simulate: bool = True
    weights: PrefixLossWeights = PrefixLossWeights()
    target_layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    outlier_threshold: Annotated[Number, Field(gt=1)] = 64.0
    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 4
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-2
    epochs: Annotated[int, Field(ge=0)] = 3
    batch_size: Annotated[int, Field(ge=1)] = 1
    clip_grad: Annotated[Number, Field(gt=0)] = 1.0
    early_stop: Annotated[int, Field(ge=1)] = 3
    seed: Annotated[int, Field(ge=0)] = 0
    max_kl: Annotated[Number, Field(gt=0)] | None = 0.2


class PrefixParams(Group):
    use: Literal["none", "found", "trained", "discretised"] = "found"
    length: Annotated[int, Field(ge=1)] | None = None
