"""The time that is left for a run."""

import pytest

from pipeline.runtime.files import write_json
from pipeline.runtime.pace import estimate_run, format_duration

STAGES = ["code", "model", "prefix_search", "quantizer_init", "finetuning", "evaluation@export", "report"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (725, "12:05"), (3729, "1:02:09")])
def test_durations_are_minutes_and_seconds(seconds, text):
    assert format_duration(seconds) == text


def test_a_machine_that_is_twice_as_slow_takes_twice_as_long(tmp_path):
    for stage, seconds in {"model": 24, "prefix_search": 158, "quantizer_init": 412}.items():
        write_json(tmp_path / f"{stage}.json", {"seconds": seconds})
    assert estimate_run(STAGES, "finetuning", tmp_path) == pytest.approx(2 * (70 + 8))
    assert estimate_run(STAGES, "report", tmp_path) == 0


def test_nothing_is_estimated_from_too_little(tmp_path):
    write_json(tmp_path / "model.json", {"seconds": 24})
    assert estimate_run(STAGES, "prefix_search", tmp_path) is None
    assert estimate_run(STAGES, "rotation", tmp_path) is None
    (tmp_path / "model.json").write_text("{")
    assert estimate_run(STAGES, "quantizer_init", tmp_path) is None
