"""kernels.cpp as operators of torch, `torch.ops.prefixquant.*`: compiled for this machine when first asked for.

What was compiled is kept where PyTorch keeps extensions (TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions on Linux),
under a name that knows the source, the compiler, PyTorch's version and the processor. It takes ten seconds, and a C++
compiler (`c++`, or what CXX names); where there is none, or it fails, everything runs without these operators, slower.
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

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("kernels.cpp")
DTYPES = (torch.float32, torch.bfloat16)  # of activations, in and out
# Compiled and linked apart: OpenMP is to be the one that PyTorch brings along, not another with threads of its own.
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
    """Whether the operators of kernels.cpp are there; compiles them the first time, and says why not."""
    try:
        load_library(
            SOURCE, Path(cpp_extension._get_build_directory("prefixquant", False))
        )  # knows of TORCH_EXTENSIONS_DIR
    except (OSError, NotImplementedError, subprocess.CalledProcessError) as error:  # also: a folder without locks
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        why = next((line for line in lines if "error" in line), lines[0] if lines else repr(error))
        logger.warning("kernels for this processor cannot be had, slower ones are used: %s", why)
        return False
    _describe_operators()
    return True


def load_library(source: Path, folder: Path) -> None:
    """Have the operators of `source` in this process; what lies in `folder` and cannot be loaded is compiled anew.

    Raises:
        OSError, subprocess.CalledProcessError: as `build`; OSError also where it cannot be loaded when it is new.
    """
    library = build(source, folder)
    try:
        torch.ops.load_library(library)
    except OSError:
        library.unlink()
        torch.ops.load_library(build(source, folder))


def build(source: Path, folder: Path) -> Path:
    """Compile `source` into a library in `folder`, unless it is there already.

    Raises:
        OSError: there is no compiler, or `folder` cannot be written.
        subprocess.CalledProcessError: the compiler fails; its `stderr` says why.
    """
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    library = folder / f"{describe_build(source, compiler)}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # several processes may start at once; one compiles, and is let go when it dies
        return library if library.is_file() else _compile(source, compiler, library)


def _compile(source: Path, compiler: list[str], library: Path) -> Path:
    headers = [f"-I{path}" for path in cpp_extension.include_paths()]
    found = [f"-L{path}" for path in cpp_extension.library_paths()]
    # Beside its place, then moved there in one step: what is killed while it compiles leaves no library.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled, linked = f"{scratch}/kernels.o", f"{scratch}/kernels.so"
        _call([*compiler, *_COMPILED, *_DEFINED, *headers, str(source), "-o", compiled])
        _call([*compiler, compiled, *found, *_LINKED, "-o", linked])
        os.replace(linked, library)
    return library


def describe_build(source: Path, compiler: list[str]) -> str:
    """A name for what `build` makes: other sources, compilers, versions of PyTorch and processors have others."""
    parts = [source.read_text(encoding="utf-8"), torch.__version__, *_COMPILED, *_DEFINED, *_LINKED]
    parts += [*compiler, _call([*compiler, "--version"]), _describe_processor()]
    return f"kernels-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}"


def _describe_processor() -> str:
    """What `-march=native` goes by, as far as it can be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _describe_operators() -> None:
    """Shapes and dtypes, for `torch.compile`."""

    def describe_rows(codes: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, *rest: Any) -> torch.Tensor:
        return codes.new_empty((*codes.shape[:-1], len(scale)), dtype=rest[2])

    descriptions = {
        "rotated_codes": lambda x, *rest: x.new_empty(x.shape, dtype=torch.uint8),
        "cached_keys": lambda keys, *rest: keys.new_empty(keys.shape),
        "nibble_product": describe_rows,
        "served_product": describe_rows,
    }
    for name, describe in descriptions.items():
        torch.library.register_fake(f"prefixquant::{name}", describe)


def _call(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout
