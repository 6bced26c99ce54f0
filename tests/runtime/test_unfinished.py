"""Unfinished work is continued only by the same code, header and number of ranks, after a block that all finished."""

import logging

import pytest
import torch

from pipeline.runtime import unfinished
from pipeline.runtime.artifacts import make_header
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.runtime.unfinished import describe_code, load_generation, open_work_folder, save_generation

HEADER = make_header("finetuning", {"seed": 0})


class RankOfTwo(Ranks):
    """Rank 0 of two. The other rank's values in `min_` are given beforehand."""

    def __init__(self, *other_values):
        super().__init__(0, 2)
        self.other_values = list(other_values)

    def min_(self, *tensors):
        for tensor in tensors:
            tensor.clamp_(max=self.other_values.pop(0))

    def wait(self):
        pass


def streams_after(blocks):
    return {"hidden": torch.full((2, 3), float(blocks))}


def test_the_state_after_the_last_finished_block_comes_back(tmp_path):
    assert load_generation(tmp_path, HEADER, ALONE) == (0, {})
    for blocks in (1, 2, 3):
        save_generation(tmp_path, streams_after(blocks), blocks, HEADER, ALONE)
    finished, saved = load_generation(tmp_path, HEADER, ALONE)
    assert finished == 3
    assert torch.equal(saved["hidden"], streams_after(3)["hidden"])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("finished_by_other", "expected"), [(4, 4), (3, 3), (0, 0)])
def test_two_ranks_continue_after_the_last_block_that_both_finished(finished_by_other, expected, tmp_path):
    ranks = RankOfTwo(finished_by_other, finished_by_other)
    for blocks in (2, 3, 4):
        save_generation(tmp_path, streams_after(blocks), blocks, HEADER, ranks)
    finished, saved = load_generation(tmp_path, HEADER, ranks)
    assert finished == expected
    assert saved == {} if expected == 0 else torch.equal(saved["hidden"], streams_after(expected)["hidden"])


def test_work_of_another_header_or_number_of_ranks_is_not_continued(tmp_path, caplog):
    save_generation(tmp_path, streams_after(1), 1, HEADER, ALONE)
    with caplog.at_level(logging.WARNING):
        assert load_generation(tmp_path, make_header("finetuning", {"seed": 1}), ALONE) == (0, {})
        assert "had other settings or inputs" in caplog.text
        assert load_generation(tmp_path, HEADER, RankOfTwo(1, 1)) == (0, {})
        assert "had another number of processes" in caplog.text


def test_a_work_folder_is_removed_after_success_and_other_stages_keep_theirs(tmp_path):
    folder = tmp_path / ".work/rotation"
    with open_work_folder(folder, ALONE):
        (folder / "block").write_text("1")
        (tmp_path / ".work/model").mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == [".work", "model"]
    (tmp_path / ".work/model").rmdir()
    with open_work_folder(folder, ALONE):
        pass
    assert list(tmp_path.iterdir()) == []


def fail_in(folder, file_name):
    """Run a stage that writes a file, or none, and then fails."""

    def run():
        with open_work_folder(folder, ALONE):
            if file_name is not None:
                (folder / file_name).write_text("1")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run()


def test_a_failed_stage_leaves_its_finished_work_and_otherwise_no_folder(tmp_path):
    folder = tmp_path / ".work/rotation"
    fail_in(folder, None)
    assert list(tmp_path.iterdir()) == []
    fail_in(folder, "block")
    with open_work_folder(folder, ALONE):
        assert (folder / "block").read_text() == "1"


def test_the_work_of_other_code_is_removed(tmp_path, monkeypatch, caplog):
    folder = tmp_path / ".work/rotation"
    fail_in(folder, "block")
    monkeypatch.setattr(unfinished, "describe_code", lambda: "0" * 64)
    with open_work_folder(folder, ALONE):
        assert not (folder / "block").exists()
    assert "is of another version of the code" in caplog.text
    assert len(describe_code()) == 64
