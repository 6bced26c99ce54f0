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


class PrefixParams(Group):
    use: Literal["none", "found"]


class WeightParams(Group):
    bits: Bits
    group_size: int
    rounding: Literal["rtn", "gptq"]
    damping: Annotated[Number, Field(gt=0, le=1)]


class SiteParams(Group):
    bits: Bits


class QuantizerInitParams(Group):
    weights: WeightParams
    activations: SiteParams
    keys: SiteParams
    values: SiteParams
    scale_search: Literal["mse", "minmax"]
    search_tokens: Annotated[int, Field(ge=64)]
    embedding_dtype: FloatDtype


class EvaluationParams(Group):
    compare_with_original: bool


class RuntimeParams(Group):
    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Field(ge=1)] | None
    batch_size: Annotated[int, Field(ge=1)]


class Params(Group):
    model: ModelParams
    corpora: Annotated[dict[str, CorpusParams], Field(min_length=1)]
    calibration: CalibrationParams
    rotation: RotationParams
    prefix_search: PrefixSearchParams
    prefix: PrefixParams
    quantizer_init: QuantizerInitParams
    evaluation: EvaluationParams
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


def check_against_model(params: Params, linears: dict[str, int], max_positions: int) -> None:
    """Check what depends on the model.

    Args:
        params: the whole plan.
        linears: name of each quantized linear (as in the checkpoint, one block suffices) -> its in_features.
        max_positions: the longest sequence the model was made for.

    Raises:
        ParamsError: a weight group size does not divide some layer, or windows are too long; all problems are listed.
    """
    size = params.quantizer_init.weights.group_size
    problems = [
        f"quantizer_init.weights.group_size={size} does not divide in_features={width} ({name}); "
        "use a divisor or -1 for whole rows"
        for name, width in linears.items()
        if size != -1 and width % size
    ]
    for name in ("search", "train", "validation", "evaluation"):
        length = getattr(params.calibration, name).length
        if length > max_positions:
            problems.append(
                f"calibration.{name}.length={length} exceeds the model's max_position_embeddings={max_positions}; "
                "use shorter windows (the prefix needs a few positions too)"
            )
    if problems:
        raise ParamsError(_list_problems("params", problems))


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
    group_size = params.quantizer_init.weights.group_size
    if group_size != -1 and group_size < 2:
        problems.append(
            f"quantizer_init.weights.group_size={group_size}: allowed are -1 (whole rows) and sizes from 2 on; use -1"
        )
    for kind, source in [("model.source", params.model.source)] + [
        (f"corpora.{name}.source", corpus.source) for name, corpus in params.corpora.items()
    ]:
        known = (PACKAGED_MODEL,) if kind == "model.source" else PACKAGED_CORPORA
        if source.startswith("packaged:") and source not in known:
            problems.append(f"{kind}={source!r} is not packaged; packaged are: {', '.join(known)}")
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
        else:  # a mapping by name, such as corpora
            kind = get_args(kind)[1]
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Group) else []
