"""Check that an installed wheel is complete: run it with the Python of an environment that has nothing else.

    python -I .ci/smoke.py

Import the modules that users import, look for the other files, and ask the commands for their help.
"""

import importlib
import importlib.metadata
import importlib.resources
import subprocess
import sys
from pathlib import Path

MODULES = (
    "prefixquant.registration",
    "prefixquant.project",
    "pipeline.hf",
    "pipeline.quantized_model",
    "pipeline.serving.plugin",
    "stages.opening",
)
DATA = ("kernels/kernels.cpp", "evaluation/tasks/word_analogies.yaml", "evaluation/tasks/last_word_wikipedia.yaml")
PROJECT = ("params.yaml", "dvc.yaml", "requirements-packaged.txt", ".dvc/plots/curves.json", "presets/w4a4kv4.yaml")
COMMANDS = (
    "prefixquant.command",
    "pipeline.generate",
    "pipeline.evaluate",
    "pipeline.lm_eval_tasks",
    "stages.rotation",
)


def main() -> None:
    for name in MODULES:
        importlib.import_module(name)
    package = importlib.resources.files("pipeline")
    if "site-packages" not in str(package):
        sys.exit(f"{package} is not an installed package. Run this with the Python of the new environment, and -I")
    missing = [path for path in DATA if not package.joinpath(path).is_file()]
    project = importlib.resources.files("prefixquant").joinpath("project")
    missing += [path for path in PROJECT if not project.joinpath(path).is_file()]
    if missing:
        sys.exit(f"the wheel lacks {', '.join(missing)}. Add them to package-data in pyproject.toml, or to setup.py")
    for name in COMMANDS:
        subprocess.run([sys.executable, "-I", "-m", name, "--help"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [str(Path(sys.executable).with_name("prefixquant")), "quantize", "--help"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    version = importlib.metadata.version("prefixquant-pipeline")
    if version != importlib.import_module("pipeline.version").VERSION:
        sys.exit(f"the wheel's version is {version}, pipeline.version says otherwise. Build it again")
    modules, files = len(MODULES) + len(COMMANDS), len(DATA) + len(PROJECT)
    print(f"prefixquant-pipeline {version}: {modules} modules and {files} files are there")


if __name__ == "__main__":
    main()
