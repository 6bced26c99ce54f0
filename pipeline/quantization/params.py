"""The group `quantizer_init` of params.yaml: its types, the settings of each site, and its contradictions."""

import difflib
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from pipeline.models.sites import REPRESENTATIVES, QuantizerGroup, base_site, site_group
from pipeline.numerics.formats import FORMATS, INT, INT16, is_quantized
from pipeline.runtime.params import Bits, FloatDtype, Group, Number

FormatName = Literal["int", "int16", "fp8_e4m3", "mxfp4", "nvfp4"]
Mode = Literal["static", "dynamic"]
WeightRange = Literal["max", "tensor", "layer", "block"]
ActivationRange = Literal["max", "percentile", "tensor", "layer", "block"]
Rounding = Literal["rtn", "gptq"]
# Written out for type checkers; tests/models/test_sites.py compares it with the table of sites.
EqualizedSite = Literal["attention_input", "key", "value", "mlp_input", "mlp_hidden"]
BudgetBits = Literal[2, 3, 4, 5, 6, 7, 8]
# Bound of a budget -> the groups whose bits it chooses.
BUDGETED_GROUPS: dict[str, tuple[QuantizerGroup, ...]] = {
    "weights": ("weights",),
    "size_mib": ("weights",),
    "activations": ("activations",),
    "kv_cache": ("keys", "values"),
    "time": ("activations",),
}


class QuantizerParams(Group):
    """The settings that every quantizer has."""

    format: FormatName = "int"
    bits: Bits = 4
    symmetric: bool = True
    group_size: int = -1
    centered: bool = True


class WeightParams(QuantizerParams):
    range: WeightRange = "tensor"
    rounding: Rounding = "gptq"
    damping: Annotated[Number, Field(gt=0, le=1)] = 0.1


class ActivationParams(QuantizerParams):
    mode: Mode = "static"
    range: ActivationRange = "layer"
    percentile: Annotated[Number, Field(gt=50, le=100)] = 99.99
    clipping: bool = True


class KeyParams(ActivationParams):
    before_rope: bool = False


class OverrideParams(Group):
    """Settings in which some sites of some blocks differ; null: as in the site's group."""

    sites: Annotated[list[str], Field(min_length=1)]
    blocks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    format: FormatName | None = None
    bits: Bits | None = None
    mode: Mode | None = None
    symmetric: bool | None = None
    group_size: int | None = None
    centered: bool | None = None
    range: ActivationRange | None = None
    rounding: Rounding | None = None

    def changes(self) -> dict[str, Any]:
        """Return the settings that differ: key -> value."""
        return self.model_dump(exclude={"sites", "blocks"}, exclude_none=True)


class BudgetParams(Group):
    """Bounds within which bits are chosen for each site and block; null: no bound, bits as asked."""

    weights: Annotated[Number, Field(ge=2, le=16)] | None = None
    size_mib: Annotated[Number, Field(gt=0)] | None = None
    activations: Annotated[Number, Field(ge=2, le=16)] | None = None
    kv_cache: Annotated[Number, Field(ge=2, le=16)] | None = None
    time: Annotated[Number, Field(gt=0, le=16)] | None = None
    choices: Annotated[list[BudgetBits], Field(min_length=2)] = Field(default_factory=lambda: [4, 8])

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by their keys."""
        values = {name: getattr(self, name) for name in BUDGETED_GROUPS}
        return {name: value for name, value in values.items() if value is not None}


class QuantizerInitParams(Group):
    weights: WeightParams = WeightParams()
    activations: ActivationParams = ActivationParams()
    keys: KeyParams = KeyParams()
    values: ActivationParams = ActivationParams(range="tensor")
    overrides: list[OverrideParams] = Field(default_factory=list)
    equalize: list[EqualizedSite] = Field(default_factory=lambda: list(get_args(EqualizedSite)))
    mse_samples: Annotated[int, Field(ge=1)] = 4
    embedding_dtype: FloatDtype = "bfloat16"
    lm_head_bits: Literal[8, 16] = 16
    budget: BudgetParams = BudgetParams()
    keep_unrounded: bool = False

    def describe(self) -> dict[str, Any]:
        """Return the values that determine a result, for headers. Keys that were added later are left out where off."""
        is_off = {
            "budget": not self.budget.bounds,
            "keep_unrounded": not self.keep_unrounded,
            "lm_head_bits": self.lm_head_bits == 16,
        }
        return self.model_dump(exclude={name for name, off in is_off.items() if off})


@dataclass(frozen=True)
class SiteSettings:
    """The settings of one site, or of one linear's weight, in one block: overrides are applied.

    The attributes are the keys of params.yaml. Weights have no `mode`, `percentile` and `clipping`, all others no
    `rounding` and `damping`; those keep the defaults below.
    """

    format: FormatName
    bits: int
    symmetric: bool
    group_size: int
    centered: bool
    range: ActivationRange
    mode: Mode = "static"
    percentile: float = 100.0
    clipping: bool = False
    rounding: Rounding = "rtn"
    damping: float = 0.0

    @property
    def quantized(self) -> bool:
        """Whether anything is quantized."""
        return is_quantized(self.format, self.bits)

    @property
    def dynamic(self) -> bool:
        """Whether the range is measured on every token."""
        return self.mode == "dynamic"

    def find_group_size(self, group: QuantizerGroup) -> int:
        """Return how many channels share a stored scale: `group_size`, or the block that the format fixes.

        The exception is nvfp4 outside of weights, where blocks get their scales at run time (`QuantizerSpec.format`).
        """
        block = FORMATS[self.format].block
        if block is None:
            return self.group_size
        return -1 if self.format == "nvfp4" and group != "weights" else block


def resolve_site(params: QuantizerInitParams, site: str, block: int) -> SiteSettings:
    """Return the settings of a site, or of a weight by its linear's short name (q_proj, …), in a block.

    The last override that names the site and the block applies.
    """
    values = _read_group(params, site)
    for override in params.overrides:
        if base_site(site) in override.sites and (override.blocks is None or block in override.blocks):
            values |= override.changes()
    return SiteSettings(**{field.name: values[field.name] for field in fields(SiteSettings) if field.name in values})


def _read_group(params: QuantizerInitParams, site: str) -> dict[str, Any]:
    """Return the values of the group of params that a site belongs to, without overrides."""
    return getattr(params, site_group(base_site(site))).model_dump()


def _find_format_problems(key: str, site: str, values: dict[str, Any]) -> list[str]:
    """Return a line for each setting of a site that its number format does not have."""
    name = values["format"]
    if name == INT or (values["bits"] == 16 and name != INT16):
        return []
    number_format, problems = FORMATS[name], []
    if name == INT16 and (site_group(base_site(site)) if site not in REPRESENTATIVES else site) != "activations":
        return [f"{key}.format='int16': only activations have it ({site}). Use int."]
    if name == INT16 and values.get("mode") == "dynamic":
        problems.append(f"{key}.mode='dynamic': int16 has static scales only ({site}). Set mode: static.")
    if values["bits"] != number_format.bits:
        problems.append(
            f"{key}.bits={values['bits']}: {name} has {number_format.bits} bits ({site}). Set bits: "
            f"{number_format.bits}."
        )
    if not values["symmetric"] and name != INT16:
        problems.append(f"{key}.symmetric=false: {name} has no zero point ({site}). Set symmetric: true.")
    if number_format.block is not None and values["group_size"] not in (-1, number_format.block):
        problems.append(
            f"{key}.group_size={values['group_size']}: {name} has blocks of {number_format.block} ({site}). "
            "Set group_size: -1."
        )
    if name == "mxfp4" and values.get("mode") == "static":
        problems.append(f"{key}.mode='static': mxfp4 has no static scales ({site}). Set mode: dynamic.")
    return problems


def _find_budget_problems(params: QuantizerInitParams) -> list[str]:
    """Return a line for each bound under which no bits can be chosen."""
    budget, key, problems = params.budget, "quantizer_init.budget", []
    if len(set(budget.choices)) < len(budget.choices):
        problems.append(f"{key}.choices={budget.choices}: names a number twice. Name each once.")
    for first, second in (("weights", "size_mib"), ("activations", "time")):
        if {first, second} <= budget.bounds.keys():
            problems.append(
                f"{key}.{second}={budget.bounds[second]}: `{first}` has a bound already. Empty one of them."
            )
    for bound in budget.bounds:
        for group in BUDGETED_GROUPS[bound]:
            values: QuantizerParams = getattr(params, group)
            if values.format != INT:
                problems.append(
                    f"{key}.{bound}: quantizer_init.{group}.format={values.format!r} has {values.bits} bits and no "
                    "others. Set format: int, or remove the bound."
                )
            elif values.bits not in budget.choices:
                problems.append(
                    f"{key}.{bound}: quantizer_init.{group}.bits={values.bits} is not one of choices={budget.choices}. "
                    "Add it to them, or remove the bound."
                )
    return problems


def find_contradictions(params: QuantizerInitParams) -> list[str]:
    """Return a line for each combination of settings that contradicts itself, whatever the model."""
    problems = _find_budget_problems(params)
    sizes = {f"quantizer_init.{group}": getattr(params, group).group_size for group in REPRESENTATIVES}
    sizes |= {_override_key(number): override.group_size for number, override in enumerate(params.overrides)}
    for key, size in sizes.items():
        if size is not None and size != -1 and size < 2:
            problems.append(f"{key}.group_size={size}: allowed are -1 (whole rows) and sizes from 2 on. Use -1.")
    for number, override in enumerate(params.overrides):
        key, changes = _override_key(number), override.changes()
        for site in override.sites:
            group_values = _read_group(params, site)
            values = group_values | changes
            if values.get("mode") == "dynamic" and values["range"] == "percentile":
                problems.append(
                    f"{key}: {site} would be dynamic with range='percentile', which needs mode: static. Set a range "
                    "or a mode for it."
                )
            problems += _find_format_problems(key, site, values)
            for name in changes.keys() - group_values.keys():
                problems.append(f"{key}.{name}: {site} has no such setting. Remove it, or the site.")
            if site_group(site) == "weights" and override.range == "percentile":
                problems.append(f"{key}.range='percentile': not for weights ({site}). Use max, tensor, layer or block.")
        if not changes:
            problems.append(f"{key} changes nothing. Add a setting (bits, …) or remove it.")
    for group, site in REPRESENTATIVES.items():
        values = _read_group(params, site)
        problems += _find_format_problems(f"quantizer_init.{group}", group, values)
        if values.get("mode") == "dynamic" and values["range"] == "percentile":
            problems.append(
                f"quantizer_init.{group}.range='percentile': needs mode: static, because a dynamic range is measured "
                "on each token. Use max, tensor, layer or block."
            )
    return problems


def find_misfits(params: QuantizerInitParams, widths: dict[str, int], blocks: int) -> list[str]:
    """Return a line for each setting that does not fit a model.

    Args:
        widths: every site and linear of a block -> the size of its last dimension.
        blocks: how many blocks the model has.
    """
    problems = []
    for number, override in enumerate(params.overrides):
        key = _override_key(number)
        for site in override.sites:
            if site not in widths:
                close = difflib.get_close_matches(site, widths, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else "Use one of them."
                problems.append(f"{key}.sites={site!r}: this model's sites are {', '.join(widths)}. {hint}")
        for index in override.blocks or ():
            if index >= blocks:
                problems.append(f"{key}.blocks={index}: the model has blocks 0 to {blocks - 1}. Remove it.")
    for site, width in widths.items():
        group = site_group(base_site(site))
        sizes = {f"quantizer_init.{group}": getattr(params, group).group_size}
        sizes |= {
            _override_key(number): override.group_size
            for number, override in enumerate(params.overrides)
            if override.group_size is not None and base_site(site) in override.sites
        }
        for key, size in sizes.items():
            if size > 1 and width % size:
                problems.append(
                    f"{key}.group_size={size}: does not divide {width}, the width of {site}. Use a divisor, or -1 for "
                    "whole rows."
                )
        resolved = [resolve_site(params, site, index) for index in range(blocks)]
        for name in dict.fromkeys(settings.format for settings in resolved if settings.quantized):
            block = FORMATS[name].block
            if block is not None and width % block:
                problems.append(
                    f"quantizer_init.{group}.format={name!r}: its blocks of {block} do not divide {width}, the width "
                    f"of {site}. Use int or fp8_e4m3 there (quantizer_init.overrides)."
                )
    return problems


def _override_key(number: int) -> str:
    return f"quantizer_init.overrides[{number}]"
