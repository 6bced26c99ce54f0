"""The groups `activation_plots` and `report` of params.yaml."""

from typing import Annotated

from pydantic import Field

from pipeline.runtime.params import Group, Number


class ActivationPlotsParams(Group):
    """The windows to measure, the outliers to count and the surfaces to draw."""

    windows: Annotated[int, Field(ge=1)] = 32
    outlier_threshold: Annotated[Number, Field(gt=1)] = 64.0
    surface_blocks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None


class ReportParams(Group):
    """The prompts whose continuations the report shows."""

    prompts: list[Annotated[str, Field(min_length=1)]] | None = None
    new_tokens: Annotated[int, Field(ge=1, le=1024)] = 32
