import subprocess
import sys

import pytest

from pipeline import explain
from pipeline.params import load_params
from pipeline.planning.explain import explain_source
from tests.conftest import ROOT
from tests.planning.test_explain import DEEPSEEK_V3, QWEN3_VL_2B, write_config


def test_the_plan_lists_the_stages_of_params(tmp_path):
    params = load_params(ROOT / "params.yaml")
    lines = explain.describe_needs(explain_source(write_config(tmp_path, QWEN3_VL_2B)).config, params)
    plans = {line.split()[0]: line for line in lines if "GiB" in line}
    assert set(plans) == {"rotation", "prefix_search", "quantizer_init", "finetuning", "evaluation"}
    embedding = 151936 * 2048 * 2 / 2**30  # bytes of the table in bfloat16
    assert float(plans["rotation"].split()[2]) > embedding


@pytest.mark.parametrize(
    ("config", "code", "text"),
    [
        (QWEN3_VL_2B, 0, "Supported: qwen3_vl is imported"),
        (DEEPSEEK_V3, 1, "model_type='deepseek_v3' is not supported"),
    ],
)
def test_the_exit_code_is_the_answer(config, code, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # without params.yaml
    monkeypatch.setattr(sys, "argv", ["explain", write_config(tmp_path, config)])
    with pytest.raises(SystemExit) as end:
        explain.main()
    assert end.value.code == code
    assert capsys.readouterr().out.startswith(text)


def test_the_command_of_the_room_models_is_the_same(tmp_path):
    command = [sys.executable, "-m", "pipeline.models.explain", write_config(tmp_path, DEEPSEEK_V3)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert result.stdout.startswith("model_type='deepseek_v3' is not supported, because it has latent attention")
