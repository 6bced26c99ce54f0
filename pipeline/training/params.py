"""The group `finetuning` of params.yaml."""

from typing import Annotated, Literal

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


class FinetuningParams(Group):
    """Both phases; the keys outside `blocks` and `end_to_end` hold for both."""

    start: Literal["quantizer_init", "full_precision"] = "quantizer_init"
    autocast: Literal["auto", "none", "bfloat16"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    blocks: BlocksParams = BlocksParams()
    end_to_end: EndToEndParams = EndToEndParams()


# Keys of earlier versions -> the keys that replace them, for the error message.
RENAMED_KEYS = {
    f"finetuning.{name}": f"finetuning.blocks.{name}"
    for name in BlocksParams.model_fields
    if name not in ("enabled", "epochs")
} | {"finetuning.epochs": "finetuning.blocks.epochs and finetuning.blocks.enabled: true"}
