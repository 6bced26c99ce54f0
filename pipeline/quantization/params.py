"""The group `quantizer_init` of params.yaml, what its sites resolve to, and what contradicts itself in it."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.blocks.sites import site_group
from pipeline.runtime.params import Bits, FloatDtype, Group, Number


class QuantizerParams(Group):
    """What every quantizer has."""

    bits: Bits
    symmetric: bool
    group_size: int
    centered: bool


class WeightParams(QuantizerParams):
    range: Literal["max", "tensor", "layer", "block"]
    rounding: Literal["rtn", "gptq"]
    damping: Annotated[Number, Field(gt=0, le=1)]


class ActivationParams(QuantizerParams):
    mode: Literal["static", "dynamic"]
    range: Literal["max", "percentile", "tensor", "layer", "block"]
    percentile: Annotated[Number, Field(gt=50, le=100)]
    clipping: bool


class KeyParams(ActivationParams):
    before_rope: bool


class OverrideParams(Group):
    """What some sites of some blocks have different; null: as in the site's group."""

    sites: Annotated[list[str], Field(min_length=1)]
    blocks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    bits: Bits | None = None
    mode: Literal["static", "dynamic"] | None = None
    symmetric: bool | None = None
    group_size: int | None = None
    centered: bool | None = None
    range: Literal["max", "percentile", "tensor", "layer", "block"] | None = None
    rounding: Literal["rtn", "gptq"] | None = None


class QuantizerInitParams(Group):
    weights: WeightParams
    activations: ActivationParams
    keys: KeyParams
    values: ActivationParams
    overrides: list[OverrideParams]
    equalize: list[Literal["attention_input", "key", "value", "mlp_input", "mlp_hidden"]]
    mse_samples: Annotated[int, Field(ge=1)]
    embedding_dtype: FloatDtype


def site_params(init: QuantizerInitParams, site: str, block: int | None = None) -> tuple[str, dict[str, Any]]:
    """The group of params a site belongs to (weights | activations | keys | values), and its values.

    With a `block` the overrides that name it and the site are applied, the last one winning. A weight's site is the
    linear's short name (q_proj, …).
    """
    group = site_group(site)
    values = getattr(init, group).model_dump()
    for override in init.overrides if block is not None else ():
        if site in override.sites and (override.blocks is None or block in override.blocks):
            own = override.model_dump(exclude={"sites", "blocks"})
            values |= {key: value for key, value in own.items() if value is not None}
    return group, values


def find_contradictions(init: QuantizerInitParams) -> list[str]:
    """What cannot be meant, whatever the model: a line for each."""
    problems = []
    named = [
        (f"quantizer_init.{group}", getattr(init, group)) for group in ("weights", "activations", "keys", "values")
    ]
    named += [(f"quantizer_init.overrides[{number}]", override) for number, override in enumerate(init.overrides)]
    for key, group in named:
        if group.group_size is not None and group.group_size != -1 and group.group_size < 2:
            problems.append(
                f"{key}.group_size={group.group_size}: allowed are -1 (whole rows) and sizes from 2 on; use -1"
            )
    for number, override in enumerate(init.overrides):
        key = f"quantizer_init.overrides[{number}]"
        for site in override.sites:
            own = override.model_dump(exclude={"sites", "blocks"}, exclude_none=True)
            values = site_params(init, site)[1]
            if (values | own).get("mode") == "dynamic" and (values | own)["range"] == "percentile":
                problems.append(f"{key}: {site} would be dynamic with range='percentile', which needs mode: static")
            for name in own.keys() - values.keys():
                problems.append(f"{key}.{name}: {site} has no such setting; remove it or the site")
            if site.endswith("_proj") and override.range == "percentile":
                problems.append(f"{key}.range='percentile': not for weights; use max, tensor, layer or block")
        if all(value is None for name, value in override if name not in ("sites", "blocks")):
            problems.append(f"{key} changes nothing; add a setting (bits, …) or remove it")
    for site in ("attention_input", "key", "value"):
        group, values = site_params(init, site)
        if values["mode"] == "dynamic" and values["range"] == "percentile":
            problems.append(
                f"quantizer_init.{group}.range='percentile' needs mode: static (a dynamic range is measured on each "
                "token); use max, tensor, layer or block"
            )
    return problems


def find_misfits(init: QuantizerInitParams, widths: dict[str, int], blocks: int) -> list[str]:
    """What does not fit a model: a line for each.

    Args:
        widths: every quantizer site of a block -> the size of its last dimension.
        blocks: how many blocks the model has.
    """
    problems = []
    for number, override in enumerate(init.overrides):
        key = f"quantizer_init.overrides[{number}]"
        for site in override.sites:
            if site not in widths:
                close = difflib.get_close_matches(site, widths, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "pick one of those"
                problems.append(f"{key}.sites={site!r}: this model's sites are {', '.join(widths)}; {hint}")
        for index in override.blocks or ():
            if index >= blocks:
                problems.append(f"{key}.blocks={index}: the model has blocks 0 to {blocks - 1}; remove it")
    for site, width in widths.items():
        group, _ = site_params(init, site)
        sizes = {f"quantizer_init.{group}.group_size": getattr(init, group).group_size}
        for number, override in enumerate(init.overrides):
            if override.group_size is not None and site in override.sites:
                sizes[f"quantizer_init.overrides[{number}].group_size"] = override.group_size
        for key, size in sizes.items():
            if size > 1 and width % size:
                problems.append(
                    f"{key}={size} does not divide {width}, the width of {site}; use a divisor or -1 for whole rows"
                )
    return problems
