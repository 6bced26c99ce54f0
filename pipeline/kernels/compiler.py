"""Compile kernels.cpp into operators of torch, `torch.ops.prefixquant.*`, for this machine, at their first use.

The library is stored where PyTorch keeps its extensions (TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions on Linux).
Its name is a hash of the source, the compiler, PyTorch's version and the processor. Compiling takes ten seconds and a
C++ compiler (`c++`, or the one that CXX names). Without a compiler, or if it fails, everything runs without these
operators, only slower.
"""

import functools
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch.utils import cpp_extension

from pipeline.numerics.packing import packed_width

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("kernels.cpp")
DTYPES = (torch.float32, torch.bfloat16)  # of activations, for input and output
# Compiling and linking are separate commands, so that the OpenMP of PyTorch is linked. Another one would start its own
# threads.
_COMPILED = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-c",
)
_DEFINED = ("-DAT_PARALLEL_OPENMP=1", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
_LINKED = ("-shared", "-ltorch_cpu", "-lc10")


@functools.cache
def find_kernels() -> bool:
    """Return whether the operators of kernels.cpp can be used. Compiles them at the first call; logs a failure."""
    try:
        folder = cpp_extension._get_build_directory("prefixquant", False)  # respects TORCH_EXTENSIONS_DIR
        load_library(SOURCE, Path(folder))
    except (OSError, NotImplementedError, subprocess.CalledProcessError) as error:  # also: a folder without file locks
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else repr(error))
        logger.warning("kernels for this processor cannot be compiled, so slower ones are used: %s", reason)
        return False
    _describe_operators()
    return True


def load_library(source: Path, folder: Path) -> None:
    """Load the operators of `source` into this process. A library in `folder` that cannot be loaded is compiled again.

    Raises:
        OSError, subprocess.CalledProcessError: as `build`. OSError also if the new library cannot be loaded.
    """
    library = build(source, folder)
    try:
        torch.ops.load_library(library)
    except OSError:
        library.unlink()
        torch.ops.load_library(build(source, folder))


def build(source: Path, folder: Path) -> Path:
    """Compile `source` into a library in `folder`, unless it exists already. Returns the library's path.

    Raises:
        OSError: there is no compiler, or `folder` cannot be written.
        subprocess.CalledProcessError: the compiler fails; its `stderr` says why.
    """
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    library = folder / f"{describe_build(source, compiler)}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # Of several processes that start at once, one compiles. The system releases the lock even if that process dies.
    with FileLock(f"{folder}.lock"):
        return library if library.is_file() else _compile(source, compiler, library)


def _compile(source: Path, compiler: list[str], library: Path) -> Path:
    headers = [f"-I{path}" for path in cpp_extension.include_paths()]
    library_paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    # Built in another folder and moved in one step, so that a killed process leaves no partial library.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled, linked = f"{scratch}/kernels.o", f"{scratch}/kernels.so"
        _call([*compiler, *_COMPILED, *_DEFINED, *headers, str(source), "-o", compiled])
        _call([*compiler, compiled, *library_paths, *_LINKED, "-o", linked])
        os.replace(linked, library)
    return library


def describe_build(source: Path, compiler: list[str]) -> str:
    """Return the name of a library, a hash of its source, the compiler, PyTorch's version and the processor."""
    parts = [source.read_text(encoding="utf-8"), torch.__version__, *_COMPILED, *_DEFINED, *_LINKED]
    parts += [*compiler, _call([*compiler, "--version"]), _describe_processor()]
    return f"kernels-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}"


def _describe_processor() -> str:
    """Return the properties of the processor that `-march=native` depends on, as far as they can be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _describe_operators() -> None:
    """Register the shapes and dtypes of the operators' results, for `torch.compile`."""

    def describe_product(codes: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, *rest: Any) -> torch.Tensor:
        return codes.new_empty((*codes.shape[:-1], len(scale)), dtype=rest[2])

    descriptions = {
        "rotated_codes": lambda x, *rest: x.new_empty(x.shape, dtype=torch.uint8),
        "row_codes": lambda x, *rest: (
            x.new_empty(x.shape, dtype=torch.int8),
            x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
        ),
        "cached_keys": lambda keys, *rest: keys.new_empty(keys.shape),
        "pack_states": lambda x, bits, *rest: x.new_empty(
            (*x.shape[:-1], packed_width(x.shape[-1], bits)), dtype=torch.uint8
        ),
        "unpack_states": lambda *arguments: None,
        "key_codes": lambda keys, *rest: keys.new_empty(
            (keys.shape[0], len(rest[3]) * packed_width(keys.shape[1] // len(rest[3]), rest[7])), dtype=torch.uint8
        ),
        "attend_codes": lambda *arguments: None,
        "store_codes": lambda *arguments: None,
        "nibble_product": describe_product,
        "served_product": describe_product,
    }
    for name, describe in descriptions.items():
        torch.library.register_fake(f"prefixquant::{name}", describe)


def _call(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout
