"""The group `model` of params.yaml: the source of the model."""

from typing import Annotated

from pydantic import Field

from pipeline.runtime.params import FloatDtype, Group

PACKAGED_MODEL = "packaged:smollm2-135m"


class ModelParams(Group):
    source: Annotated[str, Field(min_length=1)] = PACKAGED_MODEL
    revision: str | None = None
    dtype: FloatDtype = "float32"
