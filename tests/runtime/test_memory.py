"""What a process may use, of memory and of a GPU's."""

import sys

import pytest
import yaml

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.memory import GIB, gpu_limit, memory_limit
from pipeline.runtime.params import RuntimeParams
from tests.conftest import ROOT
from tests.gpu_double import GpuDouble


def runtime(limit):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["runtime"]
    return RuntimeParams.model_validate(values | {"max_memory": limit})


@pytest.mark.parametrize(("given", "expected"), [(None, 18), ("6GiB", 6), ("512MiB", 0.5), ("65GiB", 18), ("0MiB", 0)])
def test_of_a_gpu_no_more_than_is_free_and_no_more_than_is_given(given, expected):
    with GpuDouble(free=24 * GIB):
        assert gpu_limit(runtime(given)) == expected * GIB
    if given is not None:
        assert memory_limit(runtime(given)) == float(given[:-3]) * (GIB if given.endswith("GiB") else GIB / 1024)


def test_without_psutil_a_limit_must_be_set(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(PipelineError, match=r"^runtime\.max_memory=null: .*psutil.*set runtime\.max_memory"):
        memory_limit(runtime(None))
    assert memory_limit(runtime("6GiB")) == 6 * GIB
