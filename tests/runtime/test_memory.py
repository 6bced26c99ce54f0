"""The memory limits of a process, on the host and on a GPU."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.free_memory import measure_available, measure_free
from pipeline.runtime.memory import GIB, gpu_limit, memory_limit
from pipeline.runtime.params import RuntimeParams
from tests.conftest import ROOT
from tests.gpu_double import GpuDouble


def runtime(limit):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["runtime"]
    return RuntimeParams.model_validate(values | {"max_memory": limit})


@pytest.mark.parametrize(
    ("max_memory", "expected"), [(None, 18), ("6GiB", 6), ("512MiB", 0.5), ("65GiB", 18), ("0MiB", 0)]
)
def test_limits_follow_max_memory_and_never_exceed_the_free_memory_of_a_gpu(max_memory, expected):
    with GpuDouble(free=24 * GIB):
        assert gpu_limit(runtime(max_memory)) == expected * GIB
    if max_memory is not None:
        unit = GIB if max_memory.endswith("GiB") else GIB / 1024
        assert memory_limit(runtime(max_memory)) == float(max_memory[:-3]) * unit


def test_without_psutil_a_limit_must_be_set(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr("pipeline.runtime.free_memory._MEMINFO", Path("/no/such/file"))
    with pytest.raises(PipelineError, match=r"^runtime\.max_memory=null: .*psutil.*set runtime\.max_memory"):
        memory_limit(runtime(None))
    assert memory_limit(runtime("6GiB")) == 6 * GIB


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="reads /proc/meminfo")
def test_free_memory_is_the_same_with_and_without_psutil(monkeypatch):
    with_psutil = measure_available()
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert measure_available() == pytest.approx(with_psutil, rel=0.2)
    monkeypatch.setattr("pipeline.runtime.free_memory._MEMINFO", Path("/no/such/file"))
    assert measure_free(torch.device("cpu")) == 0
    assert measure_free(torch.device("meta")) == 0
