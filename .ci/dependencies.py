"""Read the dependency lists of pyproject.toml, for tasks that pip cannot do.

    python .ci/dependencies.py list serving     # the requirements of an extra, one a line, without the project's own
    python .ci/dependencies.py pin              # a version for every package of `make setup`, for constraints.txt

`pin` keeps the versions that constraints.txt has and adds missing ones. With --upgrade it takes the newest versions
that fit together. It downloads metadata, and installs nothing.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
SETUP_EXTRAS = ("quantize", "eval", "dev", "docs", "notebook", "onnx", "slurm")  # of `make setup`
# Not pinned: torch's requirements for a GPU, in versions of its own choice, and setuptools, which builds packages.
_UNPINNED = re.compile(r"(nvidia|cuda)-.*|triton|setuptools")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="requirements of an extra").add_argument("extra")
    pin = commands.add_parser("pin", help="versions for constraints.txt")
    pin.add_argument("--upgrade", action="store_true", help="take the newest versions")
    arguments = parser.parse_args()
    if arguments.command == "list":
        print("\n".join(read_extra(arguments.extra)))
    else:
        pins = resolve(arguments.upgrade)
        CONSTRAINTS.write_text("".join(f"{name}=={version}\n" for name, version in pins), encoding="utf-8")


def read_extra(name: str) -> list[str]:
    """Return the requirements of an extra. Exits with the extras that exist if it is unknown."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    if name not in extras:
        sys.exit(f"{name}: unknown extra. pyproject.toml has: {', '.join(extras)}")
    return extras[name]


def resolve(upgrade: bool) -> list[tuple[str, str]]:
    """Return (name, version) of every package that `make setup` installs, sorted, as pip resolves them."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    command += [] if upgrade else ["--constraint", str(CONSTRAINTS)]
    command += ["--editable", f"{ROOT}[{','.join(SETUP_EXTRAS)}]"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    packages = [
        entry["metadata"] for entry in json.loads(done.stdout)["install"] if "dir_info" not in entry["download_info"]
    ]
    # A local version names a build (2.13.0+cpu), which other machines may not find.
    pins = [
        (package["name"], package["version"].partition("+")[0])
        for package in packages
        if not _UNPINNED.fullmatch(package["name"])
    ]
    return sorted(pins, key=lambda pin: pin[0].lower())


if __name__ == "__main__":
    main()
