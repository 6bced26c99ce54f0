"""Command-line arguments are checked before any work begins."""

import pytest

from pipeline.runtime.arguments import ArgumentError, Parser, check_writable, device, non_negative, text, whole


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        (whole(1), "0", "'0' is not a whole number from 1 to"),
        (whole(1), "1.5", "is not a whole number"),
        (whole(1), "9" * 30, "is not a whole number"),
        (non_negative, "-1", "'-1' is not a number of 0 or more"),
        (non_negative, "nan", "is not a number"),
        (non_negative, "inf", "is not a number"),
        (device, "cuda:99", r"'cuda:99' cannot be used \("),
        (device, "quantum", r"'quantum' cannot be used \("),
        (device, "meta", r"'meta' cannot be used \(its tensors hold no numbers\)"),
    ],
)
def test_a_wrong_argument_is_one_message(kind, value, problem):
    parser = Parser()
    parser.add_argument("--x", type=kind)
    with pytest.raises(ArgumentError, match=rf"argument --x: .*{problem}.*\. --help lists the allowed values"):
        parser.parse_args([f"--x={value}"])


def test_check_writable_refuses_folders_and_paths_below_files(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new/folder/x.json")
    for path in (tmp_path, tmp_path / "file/x.json"):
        with pytest.raises(ArgumentError, match="cannot be written"):
            check_writable(path)


def test_valid_arguments_are_parsed():
    parser = Parser()
    for name, kind in (("windows", whole(1, 8)), ("temperature", non_negative), ("prompt", text), ("device", device)):
        parser.add_argument(f"--{name}", type=kind)
    arguments = parser.parse_args(["--windows=8", "--temperature=0", "--prompt=é", "--device=cpu"])
    assert (arguments.windows, arguments.temperature, arguments.prompt) == (8, 0.0, "é")
    assert arguments.device.type == "cpu"
