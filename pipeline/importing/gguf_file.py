"""A GGUF file as a container: settings and tensors by name, each tensor read when it is asked for.

    file = GgufFile(path)
    file.settings["llama.block_count"].value
    file.read("blk.0.attn_q.weight")          float32 [out, in], dequantized now

A model may be split into several files, `name-00001-of-00003.gguf`. The first one has the settings, and all have
tensors. Only the table of contents is read at first: the reader of the package `gguf` would make an object of every
token of the vocabulary.

Layout (versions 2 and 3): https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

_NUMBERS = {  # value type -> struct's format
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_CHUNK = 1 << 22  # values dequantized at a time


class GgufError(ValueError):
    """A file that cannot be read. The message says why, but not which model it belongs to."""


class Setting(NamedTuple):
    """A value of the file's metadata: a number, a string, a list of numbers, or the length of a list of strings."""

    value: Any
    kind: GGUFValueType
    element: GGUFValueType | None = None


@dataclass(frozen=True)
class _Tensor:
    path: Path
    start: int
    shape: tuple[int, ...]  # as in torch
    kind: GGMLQuantizationType

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size


class GgufFile:
    """The settings and tensors of a file, or of all files of a split set.

    Attributes:
        path: the file with the settings, which is the first one.
        settings: name -> value.
        tensors: name -> its place in a file.
    """

    def __init__(self, path: Path) -> None:
        """Read the table of contents.

        Raises:
            GgufError: this is not a GGUF file, it is cut off, has an unknown type, or parts of the set are missing.
        """
        parts = find_parts(path)
        self.path = parts[0]
        self.settings, self.tensors = _read_contents(self.path)
        if "general.architecture" not in self.settings:
            raise GgufError(f"{self.path.name} does not name its architecture (general.architecture).")
        count = self._read_number("split.count", 1)
        if count not in (len(parts), 0):
            raise GgufError(
                f"{self.path.name} is one of {count} parts (split.count). Get all of them, under their first names "
                f"(…-00001-of-{count:05d}.gguf)."
            )
        for number, part in enumerate(parts[1:], start=1):
            settings, tensors = _read_contents(part)
            if "split.no" in settings and settings["split.no"].value != number:
                raise GgufError(
                    f"{part.name} says that it is part {settings['split.no'].value + 1}. Get the set again."
                )
            if both := self.tensors.keys() & tensors.keys():
                raise GgufError(f"{part.name} holds {min(both)} a second time. Get the set again.")
            self.tensors |= tensors
        total = self._read_number("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise GgufError(f"all of {self.path.name} hold {len(self.tensors)} of {total} tensors. Get the set again.")

    def _read_number(self, name: str, default: int) -> int:
        return self.settings[name].value if name in self.settings else default

    @property
    def architecture(self) -> str:
        """The name of llama.cpp's architecture."""
        return str(self.settings["general.architecture"].value)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in float32, as `gguf` dequantizes it, in little more memory than the result takes."""
        tensor = self.tensors[name]
        result = torch.empty(tensor.shape)
        rows = result.view(-1, tensor.shape[-1]).numpy()
        count = max(1, _CHUNK // tensor.shape[-1])
        for start in range(0, len(rows), count):
            part = rows[start : start + count]
            part[:] = self._dequantize(name, self._read_rows(tensor, start, len(part)))
        return result

    def _read_rows(self, tensor: _Tensor, start: int, count: int) -> numpy.ndarray:
        offset = tensor.start + start * tensor.row_bytes
        data = numpy.fromfile(tensor.path, numpy.uint8, count * tensor.row_bytes, offset=offset)
        return data.reshape(count, tensor.row_bytes)

    def _dequantize(self, name: str, data: numpy.ndarray) -> numpy.ndarray:
        try:
            return dequantize(data, self.tensors[name].kind)
        except NotImplementedError:
            raise GgufError(
                f"{name} is stored as {self.tensors[name].kind.name}, which cannot be read. Take another format."
            ) from None

    def write_excerpt(self, path: Path, settings: dict[str, Setting], tensors: dict[str, str], rows: list[int]) -> None:
        """Write a smaller file with some of this file's tensors, copied as they are stored.

        Args:
            settings: all its settings, except `general.architecture`.
            tensors: name in the smaller file -> name in this one.
            rows: the only rows that are copied of tensors outside the blocks with two dimensions.
        """
        writer = GGUFWriter(path, self.architecture)
        for name, setting in settings.items():
            writer.add_key_value(name, setting.value, setting.kind, setting.element)
        for new, name in tensors.items():
            tensor = self.tensors[name]
            if len(tensor.shape) == 2 and not name.startswith("blk."):
                data = numpy.concatenate([self._read_rows(tensor, row, 1) for row in rows])
            else:
                data = self._read_rows(tensor, 0, math.prod(tensor.shape[:-1]))
            if tensor.kind == GGMLQuantizationType.F32:
                data = data.view(numpy.float32)
            elif tensor.kind == GGMLQuantizationType.F16:
                data = data.view(numpy.float16)
            raw = None if data.dtype != numpy.uint8 else tensor.kind
            writer.add_tensor(new, data.reshape(*data.shape[: len(tensor.shape) - 1], -1), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def find_parts(path: Path) -> list[Path]:
    """Return all files of the set that `path` belongs to, in order; `path` alone where it is not split.

    Raises:
        GgufError: a part is missing.
    """
    match = _PART.search(path.name)
    if match is None:
        return [path]
    stem, count = path.name[: match.start()], int(match[2])
    suffix = path.name[match.end() - len(".gguf") :]
    parts = [path.with_name(f"{stem}-{number:05d}-of-{match[2]}{suffix}") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise GgufError(f"{', '.join(missing)} of the {count} parts is missing next to {path.name}. Get it as well.")
    return parts


def _read_contents(path: Path) -> tuple[dict[str, Setting], dict[str, _Tensor]]:
    try:
        return _Reader(path).read_contents()
    except (struct.error, UnicodeDecodeError, IndexError):
        raise GgufError(f"{path.name} is cut off or damaged in its table of contents. Get it again.") from None


class _Reader:
    """Reads through the beginning of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: mmap.mmap | bytes = b""
        if path.stat().st_size:  # an empty file cannot be mapped
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.position = 0

    def read_contents(self) -> tuple[dict[str, Setting], dict[str, _Tensor]]:
        if bytes(self.data[:4]) != b"GGUF":
            raise GgufError(f"{self.path.name} does not begin as a GGUF file does. Get it again.")
        self.position = 4
        version, tensor_count, setting_count = self._unpack("IQQ")
        if version not in (2, 3):
            raise GgufError(f"{self.path.name} is of GGUF version {version}. Only 2 and 3, little-endian, can be read.")
        settings = {}
        for _ in range(setting_count):
            name = self._read_string()
            settings[name] = self._read_setting(name)
        entries = [self._read_entry() for _ in range(tensor_count)]
        alignment = settings["general.alignment"].value if "general.alignment" in settings else 32
        begin = -(-self.position // alignment) * alignment
        return settings, {
            name: self._locate(name, shape, kind, begin + offset) for name, shape, kind, offset in entries
        }

    def _locate(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> _Tensor:
        try:
            tensor = _Tensor(self.path, start, shape, GGMLQuantizationType(kind))
        except ValueError:
            raise GgufError(f"{self.path.name}: {name} has the unknown type {kind}") from None
        end = start + math.prod(shape[:-1]) * tensor.row_bytes
        if shape[-1] % GGML_QUANT_SIZES[tensor.kind][0]:
            raise GgufError(f"{self.path.name}: {name} of shape {list(shape)} cannot be stored as {tensor.kind.name}")
        if end > len(self.data):
            size = len(self.data)
            raise GgufError(f"{self.path.name} is cut off: {name} ends at byte {end} of {size}. Get it again.")
        return tensor

    def _read_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, type and offset of the next tensor."""
        name = self._read_string()
        (dimensions,) = self._unpack("I")
        shape = self._unpack(f"{dimensions}Q")
        kind, offset = self._unpack("IQ")
        return name, tuple(reversed(shape)), kind, offset

    def _read_setting(self, name: str) -> Setting:
        kind = self._read_kind(name)
        if kind in _NUMBERS:
            return Setting(self._unpack(_NUMBERS[kind])[0], kind)
        if kind == GGUFValueType.STRING:
            return Setting(self._read_string(), kind)
        element = self._read_kind(name)
        (count,) = self._unpack("Q")
        if element in _NUMBERS:
            return Setting(list(self._unpack(f"{count}{_NUMBERS[element]}")), kind, element)
        if element != GGUFValueType.STRING:
            raise GgufError(f"{self.path.name}: {name} is a list of lists, which cannot be read.")
        for _ in range(count):
            (length,) = self._unpack("Q")
            self.position += length
        return Setting(count, kind, element)

    def _read_kind(self, name: str) -> GGUFValueType:
        (kind,) = self._unpack("I")
        try:
            return GGUFValueType(kind)
        except ValueError:
            raise GgufError(f"{self.path.name}: {name} has the unknown type {kind}") from None

    def _read_string(self) -> str:
        (length,) = self._unpack("Q")
        start, self.position = self.position, self.position + length
        return bytes(self.data[start : self.position]).decode()

    def _unpack(self, form: str) -> tuple[Any, ...]:
        """Return the next values in struct's format `form`, little-endian."""
        start, self.position = self.position, self.position + struct.calcsize(f"<{form}")
        return struct.unpack_from(f"<{form}", self.data, start)
