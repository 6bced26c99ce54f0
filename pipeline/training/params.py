"""The group `finetuning` of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.runtime.params import Group, Number


class BlocksParams(Group):
    """Phase 1, block by block."""

    enabled: bool
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    quant_lr: Annotated[Number, Field(ge=0)]
    weight_lr: Annotated[Number, Field(ge=0)]
    min_lr_factor: Annotated[Number, Field(ge=1)]
    weight_decay: Annotated[Number, Field(ge=0)]
    clip_grad: Annotated[Number, Field(gt=0)]
    loss_type: Literal["mse", "clamp_mse", "skip_mse", "normalized_mse", "cosine"]
    target: Literal["fp_input", "quant_input", "both"]
    early_stop: Annotated[int, Field(ge=1)]


class EndToEndParams(Group):
    """Phase 2, all blocks together."""

    enabled: bool
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    quant_lr: Annotated[Number, Field(ge=0)]
    norm_lr: Annotated[Number, Field(ge=0)]
    prefix_lr: Annotated[Number, Field(ge=0)]
    min_lr_factor: Annotated[Number, Field(ge=1)]
    clip_grad: Annotated[Number, Field(gt=0)]
    early_stop: Annotated[int, Field(ge=1)]


class FinetuningParams(Group):
    """Both phases; the keys outside `blocks` and `end_to_end` hold for both."""

    start: Literal["quantizer_init", "full_precision"]
    autocast: Literal["auto", "none", "bfloat16"]
    seed: Annotated[int, Field(ge=0)]
    blocks: BlocksParams
    end_to_end: EndToEndParams


# Keys of earlier versions -> the keys that replace them, for the error message.
RENAMED_KEYS = {
    f"finetuning.{name}": f"finetuning.blocks.{name}"
    for name in BlocksParams.model_fields
    if name not in ("enabled", "epochs")
} | {"finetuning.epochs": "finetuning.blocks.epochs and finetuning.blocks.enabled: true"}
