"""The base class of the groups of params.yaml, and the group `runtime`, which changes only speed and memory."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from pipeline.runtime.errors import PipelineError


class ParamsError(PipelineError):
    """params.yaml cannot be used. The message lists all problems, one per line."""


def _number(value: Any) -> Any:
    """Return text as a float where it is one.

    PyYAML (YAML 1.1) reads `5e-5` as text, and `dvc exp run -S` writes that form.
    """
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
    """A group of params.yaml: frozen, without conversion of types, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _bound_whole_numbers(cls, value: Any) -> Any:
        """Refuse whole numbers that overflow 64 bits later, or that no run would finish."""
        if any(isinstance(number, int) and abs(number) > LARGEST for number in _flatten(value)):
            raise ValueError(f"whole numbers go up to {LARGEST}")
        return value


class RuntimeParams(Group):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 4
    task_batch_size: Annotated[int, Field(ge=1)] = 16
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    offload: Literal["auto", "always", "never"] = "auto"
    offload_dir: Annotated[str, Field(min_length=1)] = ".work/offload"
    max_memory: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(MiB|GiB)$")] | None = None


def list_problems(where: str, problems: list[str]) -> str:
    """Return one message that lists all problems, one per line."""
    return f"{where}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n  " + "\n  ".join(problems)


def check_packaged(key: str, source: str, known: tuple[str, ...]) -> list[str]:
    """Return a problem where `source` begins with `packaged:` and is not one of `known`; otherwise an empty list."""
    if not source.startswith("packaged:") or source in known:
        return []
    return [f"{key}={source!r} is not packaged; packaged are: {', '.join(known)}"]
