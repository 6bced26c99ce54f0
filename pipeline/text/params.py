"""The groups of params.yaml about text: `corpora` and `calibration`."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from pipeline.runtime.params import LARGEST, Group, Number, check_packaged

GENERATED = "generated"  # the source of a corpus that the model samples
PACKAGED_CORPORA = ("packaged:wikipedia", "packaged:news")
SPLIT_GROUPS = ("search", "train", "end_to_end", "validation", "evaluation")  # the groups in `calibration`


class GenerationParams(Group):
    """Sampling of a corpus whose source is `generated`."""

    tokens: Annotated[int, Field(ge=1)] = 262144
    length: Annotated[int, Field(ge=16)] = 1024
    temperature: Annotated[Number, Field(gt=0, le=10)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    beginning: Literal["end_of_text", "chat_template"] = "end_of_text"
    batch_size: Annotated[int, Field(ge=1)] = 32


class CorpusParams(Group):
    source: Annotated[str, Field(min_length=1)]
    max_documents: Annotated[int, Field(ge=3)] | None = None
    text_field: str = "text"
    generation: GenerationParams | None = None


_EqualParts = Annotated[list[str], Field(min_length=1)]
_Proportions = Annotated[dict[str, Annotated[float, Field(gt=0, le=LARGEST)]], Field(min_length=1)]  # in any unit


_Length = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[int, Field(ge=8), Tag("tokens")],
    Discriminator(lambda value: "auto" if isinstance(value, str) else "tokens"),
]


class SplitParams(Group):
    corpora: Annotated[
        Annotated[_EqualParts, Tag("parts")] | Annotated[_Proportions, Tag("proportions")],
        Discriminator(lambda value: "proportions" if isinstance(value, dict) else "parts"),
    ]
    windows: Annotated[int, Field(ge=1)]
    length: _Length = "auto"


class EvaluationSplitParams(Group):
    corpora: Annotated[list[str], Field(min_length=1)]
    windows: Annotated[int, Field(ge=1)] | None
    length: _Length = "auto"


class CalibrationParams(Group):
    seed: Annotated[int, Field(ge=0)] = 0
    start_token: Literal["auto", "never", "always"] = "auto"
    search: SplitParams = SplitParams(corpora=["wikipedia"], windows=64)
    train: SplitParams = SplitParams(corpora=["wikipedia", "news"], windows=16)
    end_to_end: SplitParams | None = SplitParams(corpora=["wikipedia", "news"], windows=96)
    validation: SplitParams = SplitParams(corpora=["wikipedia", "news"], windows=4)
    evaluation: EvaluationSplitParams = EvaluationSplitParams(corpora=["wikipedia", "news"], windows=4)

    def splits(self) -> dict[str, SplitParams | EvaluationSplitParams]:
        """Return {name: split} of the splits that are cut."""
        named = {name: getattr(self, name) for name in SPLIT_GROUPS}
        return {name: split for name, split in named.items() if split is not None}


def split_windows(windows: int, corpora: list[str] | dict[str, float]) -> dict[str, int]:
    """Return the number of `windows` that each corpus gives: equal parts for a list, the proportions of a mapping.

    Windows that are left after rounding down go to the largest remainders, and among equal ones to the first.
    """
    proportions = corpora if isinstance(corpora, dict) else dict.fromkeys(corpora, 1.0)
    exact = {corpus: windows * part / sum(proportions.values()) for corpus, part in proportions.items()}
    counts = {corpus: int(count) for corpus, count in exact.items()}
    by_remainder = sorted(exact, key=lambda corpus: counts[corpus] - exact[corpus])
    for corpus in by_remainder[: windows - sum(counts.values())]:
        counts[corpus] += 1
    return counts


def find_contradictions(corpora: dict[str, CorpusParams], calibration: CalibrationParams) -> list[str]:
    """Return a line for each corpus of a split that is missing or named twice, and each name that is not a folder's."""
    problems = []
    for name, split in calibration.splits().items():
        for corpus in split.corpora:
            if corpus not in corpora:
                problems.append(
                    f"calibration.{name}.corpora={corpus!r} is not among the corpora "
                    f"({', '.join(sorted(corpora))}). Add it under `corpora:`, or choose one of those."
                )
        if isinstance(split, SplitParams) and isinstance(split.corpora, dict):
            counts = split_windows(split.windows, split.corpora)
            problems += [
                f"calibration.{name}.corpora.{corpus}={split.corpora[corpus]} is less than one of {split.windows} "
                "windows. Remove it, raise it, or ask for more windows"
                for corpus, count in counts.items()
                if not count
            ]
        if len(set(split.corpora)) != len(split.corpora):
            problems.append(f"calibration.{name}.corpora={split.corpora} names a corpus twice. Remove one.")
    for name, group in corpora.items():
        if not name.replace("_", "").replace("-", "").isalnum() or name.startswith("-"):
            problems.append(
                f"corpora.{name} is not a folder name. Use letters, digits, `_` and, not first, `-` (it becomes "
                "data/<name>/)."
            )
        problems += check_packaged(f"corpora.{name}.source", group.source, PACKAGED_CORPORA)
        if group.source != GENERATED and group.generation is not None:
            problems.append(
                f"corpora.{name}.generation belongs to source: {GENERATED}, and the source is {group.source!r}. "
                "Remove it, or change the source."
            )
        if group.source == GENERATED and group.max_documents is not None:
            problems.append(
                f"corpora.{name}.max_documents={group.max_documents} does not apply to source: {GENERATED}. "
                f"Set corpora.{name}.generation.tokens."
            )
    return problems


def find_misfits(calibration: CalibrationParams, max_positions: int, tokens_before: int) -> list[str]:
    """Return a line for each split whose windows are too long for the model after `tokens_before` other tokens.

    `auto` is never too long (`lengths.py`).
    """
    allowed = max_positions - tokens_before
    return [
        f"calibration.{name}.length={split.length} exceeds the {max_positions} positions of this model "
        f"(max_position_embeddings, or the length where its RoPE changes) less {tokens_before} for prefix and start "
        f"token. Use at most {allowed}"
        for name, split in calibration.splits().items()
        if split.length != "auto" and split.length > allowed
    ]
