"""The groups of params.yaml about text: `corpora` and `calibration`."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from pipeline.runtime.params import LARGEST, Group, check_packaged

PACKAGED_CORPORA = ("packaged:wikipedia", "packaged:news")
SPLIT_GROUPS = ("search", "train", "end_to_end", "validation", "evaluation")  # of `calibration`


class CorpusParams(Group):
    source: Annotated[str, Field(min_length=1)]
    max_documents: Annotated[int, Field(ge=3)] | None = None
    text_field: str = "text"


_EqualParts = Annotated[list[str], Field(min_length=1)]
_Shares = Annotated[dict[str, Annotated[float, Field(gt=0, le=LARGEST)]], Field(min_length=1)]  # in any unit


class SplitParams(Group):
    corpora: Annotated[
        Annotated[_EqualParts, Tag("parts")] | Annotated[_Shares, Tag("shares")],
        Discriminator(lambda value: "shares" if isinstance(value, dict) else "parts"),
    ]
    windows: Annotated[int, Field(ge=1)]
    length: Annotated[int, Field(ge=8)]


class EvaluationSplitParams(Group):
    corpora: Annotated[list[str], Field(min_length=1)]
    windows: Annotated[int, Field(ge=1)] | None
    length: Annotated[int, Field(ge=8)]


class CalibrationParams(Group):
    seed: Annotated[int, Field(ge=0)]
    start_token: Literal["auto", "never", "always"]
    search: SplitParams
    train: SplitParams
    end_to_end: SplitParams | None
    validation: SplitParams
    evaluation: EvaluationSplitParams

    def splits(self) -> dict[str, SplitParams | EvaluationSplitParams]:
        """Those that are cut, by name."""
        named = {name: getattr(self, name) for name in SPLIT_GROUPS}
        return {name: split for name, split in named.items() if split is not None}


def split_windows(windows: int, corpora: list[str] | dict[str, float]) -> dict[str, int]:
    """How many of `windows` each corpus gives: equal parts of a list, shares of a mapping.

    What is left after whole windows goes to the largest remainders, of equal ones to the first.
    """
    shares = corpora if isinstance(corpora, dict) else dict.fromkeys(corpora, 1.0)
    exact = {corpus: windows * share / sum(shares.values()) for corpus, share in shares.items()}
    counts = {corpus: int(wanted) for corpus, wanted in exact.items()}
    by_remainder = sorted(exact, key=lambda corpus: counts[corpus] - exact[corpus])
    for corpus in by_remainder[: windows - sum(counts.values())]:
        counts[corpus] += 1
    return counts


def find_contradictions(corpora: dict[str, CorpusParams], calibration: CalibrationParams) -> list[str]:
    """Splits of corpora that are not there, or named twice, and names that cannot be folders: a line for each."""
    problems = []
    for name, split in calibration.splits().items():
        for corpus in split.corpora:
            if corpus not in corpora:
                problems.append(
                    f"calibration.{name}.corpora={corpus!r} is not among the corpora "
                    f"({', '.join(sorted(corpora))}); add it under `corpora:` or pick one of those"
                )
        if isinstance(split.corpora, dict):
            counts = split_windows(split.windows, split.corpora)
            problems += [
                f"calibration.{name}.corpora.{corpus}={split.corpora[corpus]} is less than one of {split.windows} "
                "windows; remove it, raise it, or ask for more windows"
                for corpus, count in counts.items()
                if not count
            ]
        if len(set(split.corpora)) != len(split.corpora):
            problems.append(f"calibration.{name}.corpora={split.corpora} names a corpus twice; remove one")
    for name, corpus in corpora.items():
        if not name.replace("_", "").replace("-", "").isalnum():
            problems.append(
                f"corpora.{name} is no usable folder name; use letters, digits, `-` and `_` (it becomes data/<name>/)"
            )
        problems += check_packaged(f"corpora.{name}.source", corpus.source, PACKAGED_CORPORA)
    return problems


def find_misfits(calibration: CalibrationParams, max_positions: int, in_front: int) -> list[str]:
    """Windows longer than the model was made for, behind a prefix and a start token of `in_front` tokens together."""
    allowed = max_positions - in_front
    return [
        f"calibration.{name}.length={split.length} exceeds the {max_positions} positions of this "
        f"model (max_position_embeddings, or where its RoPE changes) less {in_front} for what stands in front; use at "
        f"most {allowed}"
        for name, split in calibration.splits().items()
        if split.length > allowed
    ]
