"""The typed view of params.yaml: parsed once, checked as a whole, reported all at once.

Each group's types and contradictions are in the room that uses it (`prefix/params.py`, …). Here the
groups are put together and checked against each other and against the model.

`load_params` returns frozen objects whose attributes are the keys of the file. Every mistake in the file is collected
into one `ParamsError`, each line naming the key, the value, the allowed values and the remedy. `check_against_model`
adds what can only be judged with the model's sizes at hand (does a group size divide a layer's width?).

The defaults of these objects are the values of the params.yaml that comes with the project (tests/test_params.py
compares them). They are for use from Python; a file has every key.
"""

import datetime
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, ValidationError

from pipeline.evaluation.params import EvaluationParams
from pipeline.export import params as export
from pipeline.export.params import ExportParams
from pipeline.importing.params import PACKAGED_MODEL, ModelParams
from pipeline.pictures.params import ActivationPlotsParams, ReportParams
from pipeline.prefix.params import PrefixParams, PrefixSearchParams, PrefixTrainingParams
from pipeline.quantization import params as quantization
from pipeline.quantization.params import QuantizerInitParams
from pipeline.rotation import params as rotation
from pipeline.rotation.params import RotationParams
from pipeline.runtime.errors import reading
from pipeline.runtime.params import Group, ParamsError, RuntimeParams, check_packaged, list_problems
from pipeline.runtime.strict_yaml import read_strict_yaml
from pipeline.text import params as text
from pipeline.text.params import PACKAGED_CORPORA, CalibrationParams, CorpusParams
from pipeline.training.params import RENAMED_KEYS, FinetuningParams


class Params(Group):
    """All groups of params.yaml. `Params()` holds the values of the file that comes with the project."""

    model: ModelParams = ModelParams()
    corpora: Annotated[dict[str, CorpusParams], Field(min_length=1)] = Field(
        default_factory=lambda: {name.removeprefix("packaged:"): CorpusParams(source=name) for name in PACKAGED_CORPORA}
    )
    calibration: CalibrationParams = CalibrationParams()
    rotation: RotationParams = RotationParams()
    prefix_search: PrefixSearchParams = PrefixSearchParams()
    prefix_training: PrefixTrainingParams = PrefixTrainingParams()
    prefix: PrefixParams = PrefixParams()
    quantizer_init: QuantizerInitParams = QuantizerInitParams()
    finetuning: FinetuningParams = FinetuningParams()
    export: ExportParams = ExportParams()
    evaluation: EvaluationParams = EvaluationParams()
    activation_plots: ActivationPlotsParams = ActivationPlotsParams()
    report: ReportParams = ReportParams()
    runtime: RuntimeParams = RuntimeParams()


def load_params(path: Path) -> Params:
    """Parse and check a params file.

    Raises:
        ParamsError: the file is missing, is not YAML, or holds keys given twice, unknown keys, wrong types, values out
            of range or contradictions; all of them are listed.
    """
    if not Path(path).is_file():
        raise ParamsError(f"{path} does not exist. Run this in the project's root, or restore the file from git.")
    with reading(lambda why: ParamsError(f"{path} is not valid YAML: {why}")):
        raw, problems = read_strict_yaml(Path(path).read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ParamsError(f"{path} must hold groups of keys (model:, corpora:, …), got {type(raw).__name__}")
    return parse_params(raw, where=str(path), problems=problems)


def parse_params(raw: dict[str, Any], where: str = "params", problems: Sequence[str] = ()) -> Params:
    """Check an already loaded mapping; see `load_params`. `problems` of its file are reported too.

    Keys with a default are required too: a file says everything that a run does.
    """
    problems = [*problems, *(f"{key}: {_MISSING}" for key in _list_missing(Params, raw))]
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        mistakes = [_describe(problem, raw) for problem in error.errors()]
        raise ParamsError(list_problems(where, [*problems, *mistakes])) from None
    contradictions = [*problems, *_contradictions(params)]
    if contradictions:
        raise ParamsError(list_problems(where, contradictions))
    return params


# Types that YAML gives to text without quotes.
_UNQUOTED = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    datetime.date: "a date",
    datetime.datetime: "a date",
}
_MISSING = "missing. Add it (see the commented params.yaml in git)."
_UNKNOWN_PREFIX = 8  # tokens to leave room for while the prefix is still to be found


def check_against_model(
    params: Params, widths: dict[str, int], blocks: int, max_positions: int, sliding_window: int | None = None
) -> None:
    """Check settings against the sizes of the model.

    Args:
        params: the whole plan.
        widths: every quantizer site of a block -> the size of its last dimension.
        blocks: how many blocks the model has.
        max_positions: the longest sequence the model was made for.
        sliding_window: window of its layers that slide; None: none does.

    Raises:
        ParamsError: a group size does not divide a site's width, an override names a site or block that does not
            exist or asks a site for something that it cannot have, windows are too long with a prefix, or a format
            cannot carry the model; all problems are listed.
    """
    problems = quantization.find_misfits(params.quantizer_init, widths, blocks)
    problems += rotation.find_misfits(params.rotation, widths)
    named = {
        "prefix_training.target_layers": params.prefix_training.target_layers,
        "activation_plots.surface_blocks": params.activation_plots.surface_blocks,
    }
    for key, indices in named.items():
        for index in indices or ():
            if index >= blocks:
                problems.append(f"{key}={index}: the model has blocks 0 to {blocks - 1}. Remove it.")
    problems += text.find_misfits(params.calibration, max_positions, count_prefix_positions(params))
    problems += export.find_misfits(params.export.formats, sliding_window)
    if problems:
        raise ParamsError(list_problems("params", problems))


def count_prefix_positions(params: Params) -> int:
    """Return how many positions the prefix takes at most, as far as params tell."""
    lengths = [0]
    if params.prefix.use != "none":
        lengths.append(params.prefix.length or _UNKNOWN_PREFIX)
    if params.prefix_training.enabled:
        lengths.append(params.prefix_training.length or _UNKNOWN_PREFIX)
    return max(lengths)


def _contradictions(params: Params) -> list[str]:
    problems = text.find_contradictions(params.corpora, params.calibration)
    problems += check_packaged("model.source", params.model.source, (PACKAGED_MODEL,))
    problems += rotation.find_contradictions(params.rotation)
    problems += quantization.find_contradictions(params.quantizer_init)
    keys = params.quantizer_init.keys
    if keys.before_rope and params.rotation.r3 != "identity" and keys.bits < 16:
        problems.append(
            "quantizer_init.keys.before_rope=true: R3 acts on keys after RoPE and would do nothing. "
            "Set rotation.r3: identity."
        )
    if params.prefix.use in ("trained", "discretised") and not params.prefix_training.enabled:
        problems.append(
            f"prefix.use={params.prefix.use!r}: no prefix is trained. Set prefix_training.enabled: true, or use found."
        )
    together = params.finetuning.end_to_end
    if together.enabled and together.weights != "fixed":
        key = f"finetuning.end_to_end.weights={together.weights!r}"
        if not params.quantizer_init.keep_unrounded:
            problems.append(
                f"{key}: needs the weights before rounding. Set quantizer_init.keep_unrounded: true, or use fixed."
            )
        blocks = params.finetuning.blocks
        if params.finetuning.start == "full_precision" or (blocks.enabled and blocks.weight_lr > 0):
            problems.append(
                f"{key}: starts from the integers of quantizer_init, and finetuning.blocks would train others. Set "
                "finetuning.start: quantizer_init and finetuning.blocks.weight_lr: 0."
            )
    if "peft" in params.export.formats and "compressed-tensors" not in params.export.formats:
        problems.append("export.formats: peft is an adapter of the compressed-tensors folder. Add compressed-tensors.")
    problems += export.find_contradictions(params.export)
    if params.export.formats and params.quantizer_init.lm_head_bits < 16:
        problems.append(
            f"export.formats: {params.export.formats[0]} cannot carry quantizer_init.lm_head_bits="
            f"{params.quantizer_init.lm_head_bits}. Set lm_head_bits: 16."
        )
    has_matrices = params.export.onnx.widest_rotation > 0  # then online rotations may be in the graph
    others = [name for name in params.export.formats if name != "peft" and not (name == "onnx" and has_matrices)]
    chosen = params.rotation
    for name, acts, instead in (
        ("r1", chosen.r1 == "online", "hadamard"),
        ("r4", chosen.r4 != "identity", "identity"),
        ("r5", chosen.r5 != "identity", "identity"),
    ):
        if others and acts:
            problems.append(
                f"export.formats: {others[0]} cannot carry rotation.{name}={getattr(chosen, name)!r}, which acts "
                f"online. Set rotation.{name}: {instead}."
            )
    return problems


def _list_missing(group: type[Group], raw: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the dotted keys that have a default and that `raw` lacks; pydantic reports those without a default.

    Groups with names of the user's choice (corpora, tasks) and items of lists (overrides) may leave keys out.
    """
    for name, field in group.model_fields.items():
        types = get_args(field.annotation) or (field.annotation,)
        if name not in raw:
            if not field.is_required():
                yield ".".join((*path, name))
        elif isinstance(raw[name], dict) and isinstance(types[0], type) and issubclass(types[0], Group):
            yield from _list_missing(types[0], raw[name], (*path, name))


def _describe(problem: Any, raw: dict[str, Any]) -> str:
    """Return one pydantic error as `key=value: allowed values. Remedy.`"""
    # A union's member names end up in the location (`…, 'constrained-int'`): keep the path into the file.
    kind = problem["type"]
    location = _path_in(raw, problem["loc"], missing=kind == "missing")
    key = ".".join(str(part) for part in location)
    if kind == "extra_forbidden" and key in RENAMED_KEYS:
        return f"{key}: renamed. Use {RENAMED_KEYS[key]}."
    if kind == "extra_forbidden":
        known = list_known_keys(location[:-1])
        close = difflib.get_close_matches(_show(location[-1]), known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Remove it."
        return f"{_show(key)}: unknown key. {hint} Known here: {', '.join(known)}."
    if kind == "missing":
        return f"{key}: {_MISSING}"
    value = problem["input"]
    if kind == "literal_error":
        choices = problem["ctx"]["expected"]
        close = difflib.get_close_matches(
            _show(value), [c.strip(" '") for c in choices.replace(" or ", ",").split(",")]
        )
        hint = f"Did you mean {close[0]!r}?" if close else "Use one of them."
        return f"{key}={_show(repr(value))}: allowed are {choices}. {hint}"
    if kind in ("model_type", "dict_type"):
        keys = ", ".join(list_known_keys(location)) or "names that you choose"
        if value is None:
            return f"{key}=null: the group is empty. Put its keys below it ({keys}), or restore them from git."
        return f"{key}={_show(repr(value))}: expected a group of keys. Put its keys below it ({keys})."
    if kind == "string_type" and type(value) in _UNQUOTED:
        return (
            f"{key}={_show(repr(value))}: expected text, but YAML reads this as {_UNQUOTED[type(value)]}. "
            'Put it in quotes, for example "no" or "12".'
        )
    return f"{key}={_show(repr(value))} ({type(value).__name__}): {problem['msg'].lower()}. Change the value."


def _show(value: Any) -> str:
    """Return the value in the file, or as much of it as can be read."""
    text = str(value)
    return text if len(text) <= 120 else f"{text[:80]} … ({len(text)} characters)"


def _path_in(raw: Any, location: tuple[Any, ...], missing: bool) -> tuple[Any, ...]:
    path: list[Any] = []
    for part in location:
        if isinstance(raw, dict) and (part in raw or missing):
            path.append(part)
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int):
            path.append(part)
            raw = raw[part]
    return tuple(path)


def list_known_keys(location: tuple[Any, ...]) -> list[str]:
    """Return the keys allowed below `location`, found by descending the declared types."""
    kind: Any = Params
    for part in location:
        if isinstance(kind, type) and issubclass(kind, Group):
            kind = kind.model_fields[part].annotation
        else:  # a mapping by name, such as corpora, or a list, such as overrides
            kind = get_args(kind)[-1]
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Group) else []
