"""`prefixquant report` prints the path of a page, or says which part of a run is missing."""

import pytest

from pipeline.inference.manifest import MANIFEST
from pipeline.runtime.errors import PipelineError
from prefixquant import report


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "out.work"
    folder.mkdir()
    (folder / "dvc.yaml").write_text("stages: {}\n")
    return folder


def test_the_page_of_a_work_folder_and_of_its_export(work, monkeypatch, capsys):
    page = work / report.PAGE
    page.parent.mkdir(parents=True)
    page.write_text("<html>")
    assert report.find_report(work) == page
    assert report.find_report(work.with_name("out")) == page
    monkeypatch.chdir(work)
    monkeypatch.setattr("sys.argv", ["prefixquant report", "."])
    report.main()
    assert capsys.readouterr().out == f"{report.PAGE}\n"


def test_it_says_which_part_is_missing(work):
    with pytest.raises(PipelineError, match="has not reached the stage report"):
        report.find_report(work)
    (work / "dvc.yaml").unlink()
    with pytest.raises(PipelineError, match="neither a work folder nor a quantized model"):
        report.find_report(work)
    (work / MANIFEST).write_text("{}")
    with pytest.raises(PipelineError, match=r"its work folder .*out\.work\.work does not exist"):
        report.find_report(work)
    with pytest.raises(PipelineError, match="gone: there is no such folder"):
        report.find_report(work / "gone")
