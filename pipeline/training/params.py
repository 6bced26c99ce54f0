"""The group `finetuning` of params.yaml."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.runtime.params import Group, Number


class BlocksParams(Group):
    """Phase 1, block by block."""

    enabled: bool = False
    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 2
    quant_lr: Annotated[Number, Field(ge=0)] = 1e-2
    weight_lr: Annotated[Number, Field(ge=0)] = 0.0
    min_lr_factor: Annotated[Number, Field(ge=1)] = 10.0
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    clip_grad: Annotated[Number, Field(gt=0)] = 0.3
    loss_type: Literal["mse", "clamp_mse", "skip_mse", "normalized_mse", "cosine"] = "mse"
    target: Literal["fp_input", "quant_input", "both"] = "both"
    early_stop: Annotated[int, Field(ge=1)] = 2


class EndToEndParams(Group):
    """Phase 2, all blocks together."""

    enabled: bool = True
    epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 2
    quant_lr: Annotated[Number, Field(ge=0)] = 3e-3
    norm_lr: Annotated[Number, Field(ge=0)] = 3e-3
    prefix_lr: Annotated[Number, Field(ge=0)] = 1e-2
    min_lr_factor: Annotated[Number, Field(ge=1)] = 10.0
    clip_grad: Annotated[Number, Field(gt=0)] = 1.0
    early_stop: Annotated[int, Field(ge=1)] = 2
    reference: Literal["cached", "alongside"] = "cached"
    validate_every: Annotated[int, Field(ge=1)] | None = None
    weights: Literal["fixed", "straight_through", "soft_rounding"] = "fixed"
    weight_lr: Annotated[Number, Field(ge=0)] = 1e-3


class FinetuningParams(Group):
    """Both phases; the keys outside `blocks` and `end_to_end` hold for both."""

    start: Literal["quantizer_init", "full_precision"] = "quantizer_init"
    autocast: Literal["auto", "none", "bfloat16"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    blocks: BlocksParams = BlocksParams()
    end_to_end: EndToEndParams = EndToEndParams()


# Keys of `end_to_end` that are younger than artifacts which must keep their fingerprint.
_YOUNGER_KEYS = ("reference", "validate_every", "weights", "weight_lr")


def list_values(params: FinetuningParams) -> dict[str, Any]:
    """Return the values that determine the artifact, without younger keys that have their default."""
    values, defaults = params.model_dump(), EndToEndParams().model_dump()
    for name in _YOUNGER_KEYS:
        if values["end_to_end"][name] == defaults[name]:
            del values["end_to_end"][name]
    return values


# Keys of earlier versions -> the keys that replace them, for the error message.
RENAMED_KEYS = {
    f"finetuning.{name}": f"finetuning.blocks.{name}"
    for name in BlocksParams.model_fields
    if name not in ("enabled", "epochs")
} | {"finetuning.epochs": "finetuning.blocks.epochs and finetuning.blocks.enabled: true"}
