"""Disk that plans announce, against the files that the stages write on tiny models."""

import importlib
import struct
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open

from pipeline.blocks.prefix_kv import PREFIX
from pipeline.models.checkpoint import Checkpoint, list_companions
from pipeline.params import load_params
from pipeline.planning.disk import OtherFiles, count_blocks, count_export
from pipeline.quantization.equalization import EQUALIZATION
from pipeline.runtime import artifacts
from pipeline.runtime.artifacts import load_tensors
from stages.opening import Run
from tests.conftest import open_model, read_json
from tests.test_stages import BEFORE_QUANTIZER, change, run

UPSTREAM = (*BEFORE_QUANTIZER, "quantizer_init", "finetuning", "evaluation original", "evaluation finetuning", "export")


def plan(stage):
    """Return what `python -m stages.STAGE --plan` describes."""
    name, _, variant = stage.partition(" ")
    module = importlib.import_module(f"stages.{name}")
    return module.plan(Run(load_params("params.yaml"), torch.device("cpu"), variant))


def count_tensors(folder):
    """Return the bytes of all tensors below a folder.

    Headers of files, the prefix and what channels were scaled by are left out: they are small on real models.
    """
    paths = [path for path in folder.rglob("*.safetensors") if path.name not in (PREFIX, EQUALIZATION)]
    total = 0
    for path in paths:
        with open(path, "rb") as file:
            total += path.stat().st_size - 8 - struct.unpack("<Q", file.read(8))[0]
    return total


def count_artifact(folder):
    """Return the bytes of tensors and of the files that belong to a tokenizer."""
    return count_tensors(folder) + sum(path.stat().st_size for path in list_companions(folder))


@contextmanager
def watch_disk(project, monkeypatch):
    """Record the bytes below .work/ and of unfinished artifacts whenever a file of tensors is complete; links once."""
    peaks, replacing = [0], artifacts.replacing

    @contextmanager
    def watched(path):
        with replacing(path) as temporary:
            yield temporary
            folders = [project / ".work", *(project / "artifacts").glob(".*.partial")]
            paths = [path for folder in folders for path in folder.rglob("*") if path.suffix != ".json"]
            files = {path.stat().st_ino: path.stat().st_size for path in paths if path.is_file()}
            peaks.append(sum(files.values()))

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "replacing", watched)
        yield peaks


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_plans_announce_the_files_that_stages_leave(project, monkeypatch, bits):
    change(project, "prefix_search.outlier_threshold", 1.5)
    change(project, "quantizer_init.weights.bits", bits)
    run(*UPSTREAM, monkeypatch=monkeypatch)
    folder = project / "artifacts"
    for stage in ("rotation", "quantizer_init", "finetuning", "export"):
        assert plan(stage).artifact == pytest.approx(count_artifact(folder / stage), rel=0.02), stage
    rotated, params = Checkpoint(folder / "rotation", "rotation"), load_params(project / "params.yaml").quantizer_init
    prefix = len(load_tensors(folder / "quantizer_init/prefix.safetensors", "quantizer_init")[0]["token_ids"])
    exported = read_json(project / "metrics/export.json")["size_mib"]
    assert count_export(rotated, params, prefix) / 2**20 == pytest.approx(exported, abs=0.03)  # MiB; headers of files
    announced = plan("evaluation original").artifact + plan("evaluation finetuning").artifact
    assert announced == pytest.approx(count_tensors(folder / "evaluation"), rel=0.01)


def test_an_export_stores_equal_tables_once(project, monkeypatch):
    for r1 in ("online", "hadamard"):
        change(project, "rotation.r1", r1)
        run("model", "corpora prose", "calibration", "rotation", "prefix_search", monkeypatch=monkeypatch)
        run(*UPSTREAM[5:], monkeypatch=monkeypatch)
        other = OtherFiles.measure(Checkpoint(project / "artifacts/finetuning", "finetuning"))
        files = (project / "artifacts/export").glob("*.safetensors")
        stored = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118
        assert ("lm_head.weight" in stored) == (r1 == "hadamard")
        assert (other.distinct_tables == other.tables) == (r1 == "hadamard")
        assert plan("export").artifact == pytest.approx(count_artifact(project / "artifacts/export"), rel=0.03)


def test_other_formats_are_counted(project, monkeypatch):
    changes = {
        "rotation.r1": "hadamard",
        "rotation.r4": "identity",
        "rotation.r5": "identity",
        "quantizer_init.weights.centered": False,
        "quantizer_init.equalize": [],
        "export.formats": ["compressed-tensors"],
        "export.drop": ["activations", "keys", "values", "prefix"],
    }
    for dotted, value in changes.items():
        change(project, dotted, value)
    run(*UPSTREAM, monkeypatch=monkeypatch)
    written = [count_artifact(project / "artifacts/export")]
    written.append(count_artifact(project / "artifacts/export_formats/compressed-tensors"))
    assert plan("export").artifact == pytest.approx(sum(written), rel=0.03)


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks.target": "fp_input"},
        {"blocks.target": "quant_input"},
        {"blocks.target": "both", "offload": "always"},
        {"end_to_end.enabled": True, "end_to_end.epochs": 1},
        {"end_to_end.enabled": True, "end_to_end.epochs": 1, "offload": "always"},
    ],
    ids=str,
)
def test_work_files_are_announced(project, monkeypatch, changes):
    """The peak is at most what the plan says, which adds up what the phases write (measured: 0.72 to 0.92 of it)."""
    change(project, "calibration.train.windows", 12)
    change(project, "finetuning.end_to_end.enabled", False)
    for name, value in changes.items():
        change(project, f"runtime.{name}" if name == "offload" else f"finetuning.{name}", value)
    run(*BEFORE_QUANTIZER, monkeypatch=monkeypatch)
    for stage in ("quantizer_init", "finetuning"):
        with watch_disk(project, monkeypatch) as peaks:
            run(stage, monkeypatch=monkeypatch)
        assert 0.7 * plan(stage).disk < max(peaks) < 1.05 * plan(stage).disk, stage


@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "gemma2"])
def test_blocks_in_full_precision_are_counted_exactly(imported, family):
    checkpoint, _ = open_model(imported[family])
    tensors = [tensor for index in range(3) for tensor in checkpoint.load_block_tensors(index).values()]
    counted = count_blocks(checkpoint, lambda index: None)
    assert (counted.total, counted.quantizers) == (sum(tensor.nbytes for tensor in tensors), 0)


def test_a_plan_explains_its_disk_figure(project, monkeypatch, capsys):
    run("model", monkeypatch=monkeypatch)
    run("rotation --plan", monkeypatch=monkeypatch)
    first, second, third = capsys.readouterr().out.splitlines()[-3:]
    assert "disk 0.00 GiB" in first
    assert second == "Disk counts the artifact (0.00 GiB) and work files that are removed at the end (0.00 GiB)."
    assert third.startswith("It does not count reports, plots")
