"""Fixtures of all tests: tiny random models (benchmarks/tiny_models.py), saved as folders and imported."""

import copy
import functools
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.tiny_models import (
    FAMILIES,
    NEAR_FAMILIES,
    POST_NORMS,
    PROSE,
    PROSE_FILE,
    SIZES,
    SLIDING,
    VOCABULARY,
    WINDOW,
    make_model,
    make_tokenizer,
    randomize_,
    tiny_params,
)
from pipeline.blocks.walk import BlockRunner
from pipeline.importing.import_model import import_model
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.params import QuantizerInitParams

# Tests import these from here.
__all__ = [
    "FAMILIES",
    "NEAR_FAMILIES",
    "POST_NORMS",
    "PROSE",
    "PROSE_FILE",
    "SIZES",
    "SLIDING",
    "WINDOW",
    "make_model",
    "make_tokenizer",
    "randomize_",
    "tiny_params",
]
ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models are tiny: threads only get in each other's way


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print a table of families and checks at the end of `pytest -m families`."""
    if config.option.markexpr != "families":
        return
    table: dict[str, dict[str, str]] = {}
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            check, _, family = report.nodeid.rpartition("::test_")[2].removesuffix("]").partition("[")
            table.setdefault(family, {})[check.replace("_", " ")] = outcome
    checks = sorted({check for own in table.values() for check in own})
    terminalreporter.section("families")
    for number, check in enumerate(checks, start=1):
        terminalreporter.line(f"({number}) {check}")
    for family, own in sorted(table.items()):
        cells = "  ".join(f"({number}) {own.get(check, '-'):7}" for number, check in enumerate(checks, start=1))
        terminalreporter.line(f"{family:24}{cells}".rstrip())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files that take minutes first, so that several workers end together."""
    items.sort(key=lambda item: item.path.name not in ("test_stages.py", "test_repro.py", "test_project.py"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("serving") and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: make serve-test")


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    """Return family -> a folder as a user would have it: config.json, model.safetensors, tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    for family in FAMILIES | NEAR_FAMILIES:
        make_model(family).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    return {family: root / family for family in FAMILIES | NEAR_FAMILIES}


@pytest.fixture(scope="session")
def imported(model_folders, tmp_path_factory) -> dict[str, Path]:
    """Return family -> the folder that the model stage writes."""
    root = tmp_path_factory.mktemp("imported")
    for family, folder in model_folders.items():
        import_model(str(folder), None, torch.float32, root / family)
    return {family: root / family for family in model_folders}


@pytest.fixture(scope="session")
def lm_eval_read_once():
    """Parse lm-eval's own tasks, 14,000 files, once in a test run, not with every command."""
    from lm_eval.tasks import _index

    root, load = Path(_index.__file__).parent, _index.load_yaml
    kept = functools.cache(functools.partial(load, resolve_func=False, recursive=True))

    def load_once(path: Path, **options: bool) -> dict:
        own = root in path.parents and options == {"resolve_func": False, "recursive": True}
        return copy.deepcopy(kept(path)) if own else load(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_index, "load_yaml", load_once)
        yield


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(7))


def open_model(folder: Path, batch_size: int = 2) -> tuple[Checkpoint, BlockRunner]:
    checkpoint = Checkpoint(folder, "model")
    return checkpoint, BlockRunner(checkpoint, torch.device("cpu"), batch_size)


@pytest.fixture
def project(tmp_path, model_folders, monkeypatch) -> Path:
    """Make a working folder with a params.yaml for the tiny tied Llama, as current directory."""
    corpus = tmp_path / "prose.txt"
    shutil.copyfile(PROSE_FILE, corpus)
    write_params(tmp_path, tiny_params(model_folders["llama_tied"], corpus))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init_params(changes: dict | None = None) -> QuantizerInitParams:
    """Return the project's `quantizer_init` with dotted keys changed ("weights.bits": 3) and two sampled windows."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["quantizer_init"] | {"mse_samples": 2}
    for dotted, value in (changes or {}).items():
        *path, last = dotted.split(".")
        group = values
        for key in path:
            group = group[key]
        group[last] = value
    return QuantizerInitParams.model_validate(values)


def write_params(folder: Path, params: dict) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
