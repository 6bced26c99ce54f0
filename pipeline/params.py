"""The typed view of params.yaml: parsed once, checked as a whole, reported all at once.

`load_params` returns frozen objects whose attributes are the keys of the file. Every mistake in the file is collected
into one `ParamsError`, each line naming the key, the value, what is allowed and the remedy. `check_against_model`
adds what can only be judged with the model's sizes at hand (does a group size divide a layer's width?).
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.errors import PipelineError

PACKAGED_MODEL = "packaged:smollm2-135m"
PACKAGED_CORPORA = ("packaged:wikipedia", "packaged:news")
HUB_CORPORA = ("wikitext2", "ptb", "c4", "pile", "redpajama")


class ParamsError(PipelineError):
    """params.yaml cannot be used; the message lists every problem found, one per line."""


def _number(value: Any) -> Any:
    """PyYAML reads `5e-5` as a string (YAML 1.1), and `dvc exp run -S` writes that form: convert by declared type."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number)]
Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
OfflineRotation = Literal["hadamard", "random", "identity"]
OnlineRotation = Literal["hadamard", "identity"]
FloatDtype = Literal["float32", "bfloat16"]


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelParams(Group):
    source: Annotated[str, Field(min_length=1)]
    revision: str | None
    dtype: FloatDtype


class CorpusParams(Group):
    source: Annotated[str, Field(min_length=1)]
    max_documents: Annotated[int, Field(ge=3)] | None = None
    text_field: str = "text"


class SplitParams(Group):
    corpora: Annotated[list[str], Field(min_length=1)]
    windows: Annotated[int, Field(ge=1)]
    length: Annotated[int, Field(ge=8)]


class EvaluationSplitParams(Group):
    corpora: Annotated[list[str], Field(min_length=1)]
    windows: Annotated[int, Field(ge=1)] | None
    length: Annotated[int, Field(ge=8)]


class CalibrationParams(Group):
    seed: Annotated[int, Field(ge=0)]
    search: SplitParams
    train: SplitParams
    validation: SplitParams
    evaluation: EvaluationSplitParams


class RotationParams(Group):
    r1: OfflineRotation
    r2: OfflineRotation
    r3: OnlineRotation
    r4: OnlineRotation
    seed: Annotated[int, Field(ge=0)]
    dtype: FloatDtype


class PrefixSearchParams(Group):
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


class PrefixParams(Group):
    use: Literal["none", "found", "trained", "discretised"]
    length: Annotated[int, Field(ge=1)] | None


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
    equalize: bool
    mse_samples: Annotated[int, Field(ge=1)]
    embedding_dtype: FloatDtype


class EndToEndParams(Group):
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
    start: Literal["quantizer_init", "full_precision"]
    epochs: Annotated[int, Field(ge=0)]
    batch_size: Annotated[int, Field(ge=1)]
    quant_lr: Annotated[Number, Field(ge=0)]
    weight_lr: Annotated[Number, Field(ge=0)]
    min_lr_factor: Annotated[Number, Field(ge=1)]
    weight_decay: Annotated[Number, Field(ge=0)]
    clip_grad: Annotated[Number, Field(gt=0)]
    loss_type: Literal["mse", "clamp_mse", "skip_mse", "normalized_mse", "cosine"]
    target: Literal["fp_input", "quant_input", "both"]
    early_stop: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    end_to_end: EndToEndParams


class ActivationPlotsParams(Group):
    windows: Annotated[int, Field(ge=1)]
    outlier_threshold: Annotated[Number, Field(gt=1)]
    surface_blocks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None


class ExportParams(Group):
    max_shard_size: Annotated[str, Field(pattern=r"^\d+(KB|MB|GB)$")]
    formats: list[Literal["compressed-tensors", "peft"]]
    drop: list[Literal["activations", "keys", "values", "prefix"]]


class TaskParams(Group):
    """How one lm-eval task is asked; null: as the task says, and all of its items."""

    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class EvaluationParams(Group):
    compare_with_original: bool
    tasks: dict[str, TaskParams]
    task_folder: str | None
    skip_unavailable: bool


class RuntimeParams(Group):
    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Field(ge=1)] | None
    batch_size: Annotated[int, Field(ge=1)]
    task_batch_size: Annotated[int, Field(ge=1)]
    processes: Annotated[int, Field(ge=1)]
    offload: Literal["auto", "always", "never"]
    offload_dir: Annotated[str, Field(min_length=1)]
    max_memory: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(MiB|GiB)$")] | None


class Params(Group):
    model: ModelParams
    corpora: Annotated[dict[str, CorpusParams], Field(min_length=1)]
    calibration: CalibrationParams
    rotation: RotationParams
    prefix_search: PrefixSearchParams
    prefix_training: PrefixTrainingParams
    prefix: PrefixParams
    quantizer_init: QuantizerInitParams
    finetuning: FinetuningParams
    export: ExportParams
    evaluation: EvaluationParams
    activation_plots: ActivationPlotsParams
    runtime: RuntimeParams


def load_params(path: Path) -> Params:
    """Parse and check a params file.

    Raises:
        ParamsError: the file is missing, is not YAML, or holds unknown keys, wrong types, values out of range or
            contradictions; all of them are listed.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist; run from the project's root, or restore it from git") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path} must hold groups of keys (model:, corpora:, …), got {type(raw).__name__}")
    return parse_params(raw, where=str(path))


def parse_params(raw: dict[str, Any], where: str = "params") -> Params:
    """Check an already loaded mapping; see `load_params`."""
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        problems = [_describe(problem, raw) for problem in error.errors()]
        raise ParamsError(_list_problems(where, problems)) from None
    problems = _contradictions(params)
    if problems:
        raise ParamsError(_list_problems(where, problems))
    return params


def check_against_model(params: Params, widths: dict[str, int], blocks: int, max_positions: int) -> None:
    """Check what depends on the model.

    Args:
        params: the whole plan.
        widths: every quantizer site of a block -> the size of its last dimension.
        blocks: how many blocks the model has.
        max_positions: the longest sequence the model was made for.

    Raises:
        ParamsError: a group size does not divide a site's width, an override names a site or block that does not
            exist or asks of a site what it cannot have, or windows are too long; all problems are listed.
    """
    init = params.quantizer_init
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
    named = {
        "prefix_training.target_layers": params.prefix_training.target_layers,
        "activation_plots.surface_blocks": params.activation_plots.surface_blocks,
    }
    for key, indices in named.items():
        for index in indices or ():
            if index >= blocks:
                problems.append(f"{key}={index}: the model has blocks 0 to {blocks - 1}; remove it")
    for name in ("search", "train", "validation", "evaluation"):
        length = getattr(params.calibration, name).length
        if length > max_positions:
            problems.append(
                f"calibration.{name}.length={length} exceeds the model's max_position_embeddings={max_positions}; "
                "use shorter windows (the prefix needs a few positions too)"
            )
    if problems:
        raise ParamsError(_list_problems("params", problems))


def site_group(site: str) -> str:
    """The group of quantizer params a site belongs to: q_proj -> weights, mlp_input -> activations, key -> keys."""
    return {"key": "keys", "value": "values"}.get(site, "weights" if site.endswith("_proj") else "activations")


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


def _contradictions(params: Params) -> list[str]:
    problems = []
    splits = {name: getattr(params.calibration, name) for name in ("search", "train", "validation", "evaluation")}
    for name, split in splits.items():
        for corpus in split.corpora:
            if corpus not in params.corpora:
                problems.append(
                    f"calibration.{name}.corpora={corpus!r} is not among the corpora "
                    f"({', '.join(sorted(params.corpora))}); add it under `corpora:` or pick one of those"
                )
        if len(set(split.corpora)) != len(split.corpora):
            problems.append(f"calibration.{name}.corpora={split.corpora} names a corpus twice; remove one")
    for name in params.corpora:
        if not name.replace("_", "").replace("-", "").isalnum():
            problems.append(
                f"corpora.{name} is no usable folder name; use letters, digits, `-` and `_` (it becomes data/<name>/)"
            )
    problems += _quantizer_contradictions(params)
    if params.prefix.use in ("trained", "discretised") and not params.prefix_training.enabled:
        problems.append(
            f"prefix.use={params.prefix.use!r} needs a trained prefix; set prefix_training.enabled: true, or use found"
        )
    if "peft" in params.export.formats and "compressed-tensors" not in params.export.formats:
        problems.append("export.formats: the peft adapter belongs on the compressed-tensors folder; add that, too")
    if "compressed-tensors" in params.export.formats and params.rotation.r4 != "identity":
        problems.append(
            f"export.formats: compressed-tensors cannot carry rotation.r4={params.rotation.r4!r}, which acts online; "
            "set rotation.r4: identity"
        )
    for kind, source in [("model.source", params.model.source)] + [
        (f"corpora.{name}.source", corpus.source) for name, corpus in params.corpora.items()
    ]:
        known = (PACKAGED_MODEL,) if kind == "model.source" else PACKAGED_CORPORA
        if source.startswith("packaged:") and source not in known:
            problems.append(f"{kind}={source!r} is not packaged; packaged are: {', '.join(known)}")
    return problems


def _quantizer_contradictions(params: Params) -> list[str]:
    init, problems = params.quantizer_init, []
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
    if init.keys.before_rope and params.rotation.r3 != "identity" and init.keys.bits < 16:
        problems.append(
            "quantizer_init.keys.before_rope=true: R3 acts on keys behind RoPE and would do nothing; "
            "set rotation.r3: identity"
        )
    return problems


def _list_problems(where: str, problems: list[str]) -> str:
    return f"{where}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n  " + "\n  ".join(problems)


def _describe(problem: Any, raw: dict[str, Any]) -> str:
    """One pydantic error as `key=value: what is allowed; remedy`."""
    # A union's member names end up in the location (`…, 'constrained-int'`): keep what is a path into the file.
    location = _path_in(raw, problem["loc"])
    key = ".".join(str(part) for part in location)
    kind = problem["type"]
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "remove it"
        return f"{key}: unknown key; {hint} (known here: {', '.join(known)})"
    if kind == "missing":
        return f"{key}: missing; add it (see the commented params.yaml in git)"
    value = problem["input"]
    if kind == "literal_error":
        choices = problem["ctx"]["expected"]
        close = difflib.get_close_matches(str(value), [c.strip(" '") for c in choices.replace(" or ", ",").split(",")])
        hint = f"; did you mean {close[0]!r}?" if close else "; pick one of those"
        return f"{key}={value!r}: allowed are {choices}{hint}"
    return f"{key}={value!r} ({type(value).__name__}): {problem['msg'].lower()}; change the value"


def _path_in(raw: Any, location: tuple[Any, ...]) -> tuple[Any, ...]:
    path: list[Any] = []
    for part in location:
        if isinstance(raw, dict):
            path.append(part)
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int):
            path.append(part)
            raw = raw[part]
    return tuple(path)


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys allowed below `location`, found by descending the declared types."""
    kind: Any = Params
    for part in location:
        if isinstance(kind, type) and issubclass(kind, Group):
            kind = kind.model_fields[part].annotation
        else:  # a mapping by name, such as corpora, or a list, such as overrides
            kind = get_args(kind)[-1]
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Group) else []
