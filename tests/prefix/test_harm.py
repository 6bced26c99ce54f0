"""The divergence that prefixes cause in full precision, its windows, and the gate of `prefix_training`."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.blocks import walk
from pipeline.prefix.harm import Harm, Reader, choose_harm_windows, join_windows, measure_harm
from pipeline.prefix.training import Candidates, PrefixGateError, check_candidates
from pipeline.runtime.ranks import Ranks
from tests.conftest import WINDOW, open_model
from tests.prefix.setup import make_place

TEXT = torch.randint(2, 320, (6, 40), generator=torch.Generator().manual_seed(5))
LONG = torch.randint(2, 320, (2, 200), generator=torch.Generator().manual_seed(6))


def make_reader(checkpoint, *token_ids):
    tokens = torch.tensor(token_ids, dtype=torch.int64)
    return Reader(checkpoint.embed(tokens), tokens)


@pytest.mark.parametrize("start", [None, 0])
@pytest.mark.parametrize("family", ["llama_untied_biases", "mistral", "gemma3_text"])
@torch.no_grad()
def test_harm_is_the_divergence_of_the_original_reading_prefix_and_text(family, start, imported):
    checkpoint, runner = open_model(imported[family])
    windows = TEXT[:2].reshape(1, 80)
    readers = [make_reader(checkpoint), make_reader(checkpoint, 9, 0), make_reader(checkpoint, 9)]
    harms = measure_harm(checkpoint, readers, windows, runner=runner, text_start_token_id=start)
    original = AutoModelForCausalLM.from_pretrained(
        imported[family], attn_implementation=checkpoint.architecture.kernel
    )

    def read(*tokens):
        token_ids = torch.cat((torch.tensor(tokens, dtype=torch.int64), windows[0]))
        return original(token_ids[None]).logits[0, -80:].log_softmax(-1)

    begin = () if start is None else (start,)
    exact, window = read(*begin), checkpoint.widest_window
    # A prefix that ends in the start token replaces it.
    for harm, prefix in zip(harms, (begin, (9, 0), (9, *begin)), strict=True):
        divergences = (exact.exp() * (exact - read(*prefix))).sum(-1).double()
        scored = divergences[::2] if window is None else torch.cat((divergences[:window:2], divergences[window::2]))
        assert harm.mean == pytest.approx(scored.mean().item(), rel=1e-3, abs=1e-6)
        if window is None:
            assert harm.after_leaving is None
        else:
            assert harm.after_leaving == pytest.approx(divergences[window::2].mean().item(), rel=1e-3, abs=1e-6)
    assert harms[0].worst == pytest.approx(0, abs=1e-9)


def test_ranks_share_prefixes(imported):
    checkpoint, runner = open_model(imported["mistral"])
    readers = [make_reader(checkpoint, *tokens) for tokens in ((), (0,), (4, 0))]
    whole = measure_harm(checkpoint, readers, LONG, runner=runner)
    for rank in range(2):
        harms = measure_harm(checkpoint, readers, LONG, runner=runner, ranks=OneOfTwo(rank))
        assert [harm.mean for harm in harms[rank::2]] == pytest.approx([harm.mean for harm in whole[rank::2]])
        assert all(harm.mean == 0 for harm in harms[1 - rank :: 2])


class OneOfTwo(Ranks):
    """One of two ranks, whose sums leave the other rank out."""

    def __init__(self, rank):
        super().__init__(rank, 2)

    def sum_(self, *tensors):
        pass


def test_windows_are_joined_until_they_go_beyond_the_sliding_window(imported):
    plain, sliding = (open_model(imported[family])[0] for family in ("llama_tied", "gemma2"))
    assert sliding.widest_window == WINDOW
    assert plain.widest_window is None
    short = TEXT[:, :10]
    assert torch.equal(choose_harm_windows(plain, (short,), 3), short)
    windows = choose_harm_windows(sliding, (short,), 3)  # 28 + 10 positions: four windows of 10, cut
    assert torch.equal(windows, short[:4].reshape(1, 40)[:, :38])
    # The first text that is long enough, and otherwise the longest.
    assert torch.equal(choose_harm_windows(sliding, (short[:2], TEXT), 3), TEXT[:, :38])
    assert choose_harm_windows(sliding, (short[:2], short[:3]), 3).shape == (1, 30)
    # Prefix, start token and text have 256 positions; all windows together have about 2048 tokens.
    many = LONG.repeat(10, 2)
    assert choose_harm_windows(plain, (many,), 5).shape == (8, 250)
    assert join_windows(TEXT, 100).shape == (2, 120)
    assert join_windows(TEXT[:2], 100).shape == (1, 80)


def test_infinite_harm_is_no_number_in_a_report():
    assert Harm(math.inf, 0.5).row() == {"full_precision_kl": None, "full_precision_kl_after_leaving": 0.5}
    assert Harm(0.5, None).row() == {"full_precision_kl": 0.5}
    assert Harm(0.5, 2.0).worst == 2.0


def check(checkpoint, runner, work_folder, max_kl, **tensors):
    candidates = Candidates(tensors, None, {"enabled": False})
    place = make_place(runner, work_folder)
    return check_candidates(checkpoint, candidates, texts=(LONG,), max_kl=max_kl, place=place)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_prefix_that_stays_visible_in_sliding_layers_fails_the_gate(family, imported, tmp_path, monkeypatch):
    """The mistake of an earlier version: full precision was 1.95 times worse, and nothing noticed."""
    checkpoint, runner = open_model(imported[family])
    token_ids = torch.tensor([7, 9, 0])
    tensors = {"found.token_ids": token_ids, "found.embeddings": checkpoint.embed(token_ids)}
    make_mask = walk.create_sliding_window_causal_mask

    def pin(config, hidden, mask, cache, position_ids):
        pinned = make_mask(config, hidden, mask, cache, position_ids).clone()
        pinned[..., : cache.get_seq_length()] = True
        return pinned

    passed = check(checkpoint, runner, tmp_path, 1.0, **tensors)
    harm = passed.report["gate"]["found"]
    assert passed.tensors.keys() == tensors.keys()
    monkeypatch.setattr(walk, "create_sliding_window_causal_mask", pin)
    _, runner = open_model(imported[family])
    bound = 1.5 * max(harm.values())
    with pytest.raises(PrefixGateError) as error:
        check(checkpoint, runner, tmp_path, bound, **tensors)
    message = str(error.value)
    assert message.startswith(f"prefix_training.max_kl={bound:g}: the found prefix changes the unquantized model by ")
    assert f"where it has left the sliding window (KL divergence on 2 windows of {LONG.shape[1]} tokens)" in message
    assert message.endswith("Set prefix_search.choose: benefit, which never chooses such a prefix, or raise the bound.")


def test_discretised_prefix_that_harms_is_left_out(imported, tmp_path, caplog):
    checkpoint, runner = open_model(imported["llama_tied"])
    found, harmful = torch.tensor([0]), torch.tensor([7, 9, 11, 0])
    tensors = {
        "found.token_ids": found,
        "found.embeddings": checkpoint.embed(found),
        "trained.embeddings": checkpoint.embed(found),
        "trained.initial_token_ids": found,
        "discretised.token_ids": harmful,
        "discretised.embeddings": checkpoint.embed(harmful),
    }
    harms = check(checkpoint, runner, tmp_path, None, **tensors).report["gate"]
    low, high = (harms[name]["full_precision_kl"] for name in ("found", "discretised"))
    assert low < high
    passed = check(checkpoint, runner, tmp_path, (low + high) / 2, **tensors)
    assert passed.tensors.keys() == {name for name in tensors if not name.startswith("discretised")}
    assert "the discretised prefix changes the unquantized model by" in caplog.text
    assert passed.report["gate"] == harms
    with pytest.raises(PrefixGateError, match=r"the trained prefix .* Raise prefix_training\.weights\.kl"):
        check(checkpoint, runner, tmp_path, low / 2, **{name: tensors[name] for name in tensors if "found" not in name})


def test_text_that_is_too_short_for_the_window_is_named(imported, tmp_path, caplog):
    checkpoint, runner = open_model(imported["gemma2"])
    found = torch.tensor([0])
    candidates = Candidates({"found.token_ids": found, "found.embeddings": checkpoint.embed(found)}, None, {})
    place = make_place(runner, tmp_path)
    check_candidates(checkpoint, candidates, texts=(TEXT[:1, :20],), max_kl=None, place=place)
    assert (
        f"is not longer than sliding_window={WINDOW}, so the gate does not read where the prefix has left"
        in caplog.text
    )


def test_no_prefix_needs_no_gate(imported, tmp_path):
    checkpoint, runner = open_model(imported["llama_tied"])
    none = {"found.token_ids": torch.zeros(0, dtype=torch.int64), "found.embeddings": torch.zeros(0, 48)}
    assert check(checkpoint, runner, tmp_path, 1e-9, **none).report == {"enabled": False}
