"""The group `quantizer_init` of params.yaml, what its sites resolve to, and what contradicts itself in it."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.models.sites import REPRESENTATIVES, site_group
from pipeline.numerics.formats import FORMATS, INT
from pipeline.runtime.params import Bits, FloatDtype, Group, Number

FormatName = Literal["int", "fp8_e4m3", "mxfp4", "nvfp4"]
# Written out for type checkers; tests/models/test_sites.py compares it with the table of sites.
EqualizedSite = Literal["attention_input", "key", "value", "mlp_input", "mlp_hidden"]


class QuantizerParams(Group):
    """What every quantizer has."""

    format: FormatName
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
    format: FormatName | None = None
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
    equalize: list[EqualizedSite]
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


def find_group_size(site: str, values: dict[str, Any]) -> int:
    """What shares a kept scale at a site: its group_size, or what its format fixes (see `QuantizerSpec.format`)."""
    block = FORMATS[values["format"]].block
    if block is None:
        return values["group_size"]
    return -1 if values["format"] == "nvfp4" and site_group(site) != "weights" else block


def _find_format_problems(key: str, site: str, values: dict[str, Any]) -> list[str]:
    """What a site's values ask for that their format does not have."""
    name = values["format"]
    if name == INT or values["bits"] == 16:
        return []
    own, problems = FORMATS[name], []
    if values["bits"] != own.bits:
        problems.append(f"{key}.bits={values['bits']}: {name} has {own.bits} ({site}); set bits: {own.bits}")
    if not values["symmetric"]:
        problems.append(f"{key}.symmetric=false: {name} has no zero point ({site}); set symmetric: true")
    if own.block is not None and values["group_size"] not in (-1, own.block):
        problems.append(
            f"{key}.group_size={values['group_size']}: {name} has blocks of {own.block} ({site}); set group_size: -1"
        )
    if name == "mxfp4" and values.get("mode") == "static":
        problems.append(f"{key}.mode='static': mxfp4 has no static part ({site}); set mode: dynamic")
    return problems


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
            problems += _find_format_problems(key, site, values | own)
            for name in own.keys() - values.keys():
                problems.append(f"{key}.{name}: {site} has no such setting; remove it or the site")
            if site.endswith("_proj") and override.range == "percentile":
                problems.append(f"{key}.range='percentile': not for weights; use max, tensor, layer or block")
        if all(value is None for name, value in override if name not in ("sites", "blocks")):
            problems.append(f"{key} changes nothing; add a setting (bits, …) or remove it")
    for group, site in REPRESENTATIVES.items():
        _, values = site_params(init, site)
        problems += _find_format_problems(f"quantizer_init.{group}", group, values)
        if values.get("mode") == "dynamic" and values["range"] == "percentile":
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
        resolved = [site_params(init, site, index)[1] for index in range(blocks)]
        for name in dict.fromkeys(values["format"] for values in resolved if values["bits"] < 16):
            block = FORMATS[name].block
            if block is not None and width % block:
                problems.append(
                    f"quantizer_init.{group}.format={name!r}: its blocks of {block} do not divide {width}, the width "
                    f"of {site}; use int or fp8_e4m3 there (overrides)"
                )
    return problems
