"""The report's part about experts: rows and lists of hand-made measurements."""

import torch

from pipeline.pictures.experts import draw_expert_tokens, list_agreement, list_experts, read_choices
from pipeline.pictures.report import build_page
from pipeline.runtime.artifacts import make_header, save_tensors
from tests.pictures.test_report import COSTS, HEADING, PREFIX, SATURATION, evaluation

BLOCKS = [
    {"experts": {"tokens": [600, 3], "starved": [{"expert": 1, "tokens": 3, "added": 509}]}},
    {},  # without experts
]
LAYERS = [
    {"layer": 0, "largest_experts": [{"expert": "experts.0", "peak": 5.0, "peak_with_prefix": 4.0}]},
    {"layer": 1},
    {"layer": 2, "largest_experts": [{"expert": "shared_expert", "peak": 900.0, "peak_with_prefix": 6.0}]},
]


def test_lists_name_blocks_and_experts():
    lists = list_experts(BLOCKS, LAYERS)
    assert lists.super_experts == [("block 2 shared_expert", 900.0, 6.0), ("block 0 experts.0", 5.0, 4.0)]
    assert lists.starved == [("block 0 experts.1", 3, 509)]
    evaluations = {
        "original": evaluation(2.0),
        "export": evaluation(3.0, router_agreement={"prose": 0.8125}),
    }
    page = build_page(
        {"bits": "W4A4KV4", "prefix": "none"},
        heading=HEADING,
        evaluations=evaluations,
        samples={},
        prefix=PREFIX,
        saturation=SATURATION,
        costs=COSTS,
        settings={},
        changes=None,
        pictures=[],
        experts=lists,
    )
    for cells in (
        "block 2 shared_<wbr>expert</td><td>900</td><td>6<",
        "block 0 experts.1</td><td>3</td><td>509<",
        "prose, router agreement</td><td></td><td>0.8125<",
    ):
        assert cells in page


def test_agreement_by_block_and_variant(tmp_path):
    original = torch.tensor([[[[0, 2]], [[2, 3]]]], dtype=torch.int32)
    changed = torch.tensor([[[[0, 2]], [[1, 3]]]], dtype=torch.int32)
    assert list_agreement({"original": original, "export": changed}) == [{"block": 0, "export": 0.5}]
    path = tmp_path / "export.safetensors"
    save_tensors(path, {"experts.a": original, "experts.b": changed}, make_header("evaluation", {}))
    assert torch.equal(read_choices(path), torch.cat((original, changed)))
    save_tensors(path, {"hidden.a": torch.zeros(1)}, make_header("evaluation", {}))
    assert read_choices(path) is None


def test_picture_of_tokens_is_drawn_for_blocks_with_and_without_experts(tmp_path):
    draw_expert_tokens(tmp_path / "tokens.png", torch.tensor([[0, 0], [5, 3]]))
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
