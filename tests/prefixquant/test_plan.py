"""`prefixquant plan`: the table has the numbers of the stages' own plans."""

import pytest
import yaml

from pipeline.explain import plan_stages
from pipeline.params import parse_params
from pipeline.planning.explain import explain_source
from pipeline.planning.need import Need
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.memory import GIB
from prefixquant import plan
from prefixquant.project import Request, choose_params
from tests.planning.test_explain import DEEPSEEK_V3, QWEN3_VL_2B, write_config


def test_a_row_for_every_stage_and_one_for_the_run(tmp_path):
    text = tmp_path / "my.txt"
    text.write_text("Some words.\n")
    source = write_config(tmp_path / "model", QWEN3_VL_2B)
    # With a fixed limit that is far away, a plan does not depend on the memory that is free at this moment.
    settings = {"calibration.seed": 3, "runtime.max_memory": "999GiB"}
    request = Request(source=source, out=tmp_path / "out", texts=(str(text),), settings=settings)
    fits, printed = plan.plan_request(request)
    params = parse_params(yaml.safe_load(choose_params(request)))
    needs = plan_stages(explain_source(source).config, params)
    assert fits
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    # Memory counts that of the process, which grows between both calls.
    for stage, need in needs.items():
        assert float(rows[stage][3]) == pytest.approx(need.artifact / GIB, abs=0.006)
        assert float(rows[stage][4]) == pytest.approx(need.work_files / GIB, abs=0.006)
    assert f"{tmp_path} has" in printed
    assert not request.work_folder.exists()


def test_the_run_needs_the_largest_memory_all_artifacts_and_the_work_files_of_one_stage():
    plans = {
        "rotation": Need(memory=2 * GIB, gpu=GIB, artifact=3 * GIB, work_files=GIB),
        "finetuning": Need(memory=5 * GIB, artifact=4 * GIB, work_files=2 * GIB),
        "evaluation": PipelineError("windows are too long"),
    }
    lines = plan.format_table(plans, {"rotation": 62.0, "finetuning": 3600.0, "activation_plots": 8.0})
    assert lines[1].split() == ["rotation", "1:02", "2.00", "1.00", "3.00", "1.00"]
    assert lines[3] == "evaluation  the settings do not fit this model (windows are too long)"
    assert lines[4].split() == ["all", "1:01:10", "5.00", "1.00", "7.00", "2.00"]


def test_a_model_that_is_not_supported_has_no_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prefixquant plan", write_config(tmp_path / "model", DEEPSEEK_V3)])
    with pytest.raises(SystemExit) as end:
        plan.main()
    assert end.value.code == 1
    assert capsys.readouterr().out.startswith("model_type='deepseek_v3' is not supported")
