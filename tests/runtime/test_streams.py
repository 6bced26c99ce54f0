"""Hidden states in files behave like tensors, and the files are removed."""

import pytest
import torch

from pipeline.runtime.streams import FileStream, Offload, as_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_in_a_file_reads_and_writes_like_a_tensor(dtype, tmp_path):
    values = torch.randn(5, 3, 4).to(dtype)
    with Offload(tmp_path / "streams") as offload:
        stream = offload.keep("a", values)
        assert isinstance(stream, FileStream)
        assert (len(stream), tuple(stream.shape), stream.dtype) == (5, (5, 3, 4), dtype)
        assert torch.equal(stream[1:3], values[1:3])
        assert torch.equal(stream[torch.tensor([4, 0])], values[torch.tensor([4, 0])])
        read = stream[0:2]
        stream[0:2] = values[3:5]
        assert torch.equal(read, values[0:2])  # a copy
        assert torch.equal(as_tensor(stream), torch.cat((values[3:5], values[2:])))
        other = offload.keep("b", values * 2)
        assert torch.equal(other[0], values[0] * 2)
        assert len(list((tmp_path / "streams").rglob("*"))) == 3
    assert list((tmp_path / "streams").iterdir()) == []


def test_streams_in_memory_are_the_tensors_themselves():
    values = torch.randn(5, 3)
    with Offload(None) as offload:
        assert offload.keep("a", values) is values
        assert as_tensor(values) is values


def test_two_runs_in_one_folder_do_not_share_files(tmp_path):
    with Offload(tmp_path) as first, Offload(tmp_path) as second:
        a, b = first.keep("a", torch.zeros(2)), second.keep("a", torch.ones(2))
        assert as_tensor(a).tolist() == [0, 0]
        assert as_tensor(b).tolist() == [1, 1]
