"""What every group of params is made of, and the group `runtime`, which changes speed and memory only."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from pipeline.runtime.errors import PipelineError


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


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flatten(item)
    else:
        yield value


LARGEST = 2**31 - 1
Number = Annotated[float, BeforeValidator(_number)]
Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
FloatDtype = Literal["float32", "bfloat16"]


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _bound_whole_numbers(cls, value: Any) -> Any:
        """Seeds, counts and sizes end up in 64 bits, where more than that is a traceback, or never done."""
        if any(isinstance(number, int) and abs(number) > LARGEST for number in _flatten(value)):
            raise ValueError(f"whole numbers go up to {LARGEST}")
        return value


class RuntimeParams(Group):
    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Field(ge=1, le=1024)] | None
    batch_size: Annotated[int, Field(ge=1)]
    task_batch_size: Annotated[int, Field(ge=1)]
    processes: Annotated[int, Field(ge=1, le=1024)]
    offload: Literal["auto", "always", "never"]
    offload_dir: Annotated[str, Field(min_length=1)]
    max_memory: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(MiB|GiB)$")] | None


def list_problems(where: str, problems: list[str]) -> str:
    """One message of all problems, a line each."""
    return f"{where}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n  " + "\n  ".join(problems)


def check_packaged(key: str, source: str, known: tuple[str, ...]) -> list[str]:
    """A problem where `source` is said to be packaged and is not."""
    if not source.startswith("packaged:") or source in known:
        return []
    return [f"{key}={source!r} is not packaged; packaged are: {', '.join(known)}"]
