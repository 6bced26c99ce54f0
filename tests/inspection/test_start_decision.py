"""`calibration.start_token`: the requested setting, or the model's training."""

import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.importing.import_model import import_model
from pipeline.inspection import start_decision
from pipeline.inspection.start_decision import StartTokenError, decide_start_token, measure_losses
from pipeline.text.start_token import set_start_token_
from pipeline.text.windows import prepend_start_token
from tests.conftest import PROSE, make_model, make_tokenizer, open_model

LENGTH = 24


@torch.no_grad()
def losses_of(model, content, start):
    """Return transformers' loss of each window; the start token is read and is not a target."""
    ids = prepend_start_token(content, start)
    targets = content.clone()
    targets[:, 0] = -100
    if start is not None:
        targets = nn.functional.pad(targets, (1, 0), value=-100)
    return torch.stack([model(row[None], labels=own[None]).loss for row, own in zip(ids, targets, strict=True)])


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "gemma3_text"])
def test_losses_are_transformers_own_on_the_same_targets(family, imported, token_ids):
    checkpoint, runner = open_model(imported[family])
    found = measure_losses(checkpoint, token_ids, runner, 0)
    for losses, start in zip(found, (None, 0), strict=True):
        assert losses.tolist() == pytest.approx(losses_of(make_model(family), token_ids, start).tolist(), rel=1e-5)
    assert not torch.allclose(*found)


@pytest.fixture(scope="module")
def windows():
    ids = make_tokenizer()(PROSE, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


@pytest.fixture(scope="module", params=[None, 0])
def trained(request, model_folders, windows, tmp_path_factory):
    """Return a tiny model trained briefly on windows with or without a start token before them, and which.

    In the second case, the start token came before other text in training, as in chat models.
    """
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(model_folders["llama_tied"], folder / "source")
    model = AutoModelForCausalLM.from_pretrained(folder / "source")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    if request.param is None:
        other = windows[8:].flip(1)[:, 1:]
        ids = torch.cat((windows[8:], prepend_start_token(other, 0)))
    else:
        ids = prepend_start_token(windows[8:], request.param)
    for _ in range(100):
        rows = torch.randint(len(ids), (16,), generator=generator)
        optimizer.zero_grad()
        model(ids[rows], labels=ids[rows]).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "source")
    import_model(str(folder / "source"), None, torch.float32, folder / "imported")
    return request.param, folder / "imported"


@pytest.mark.parametrize("habit", [None, 0])
def test_auto_follows_the_training_of_the_model(trained, habit, windows):
    """Whatever its tokenizer does."""
    wanted, folder = trained
    checkpoint, runner = open_model(folder)
    set_start_token_(checkpoint.tokenizer, habit)
    decision = decide_start_token("auto", checkpoint, windows[:8], runner)
    assert decision.token == wanted
    assert f"BOS '<s>' {'higher' if wanted is None else 'lower'}" in decision.why
    summary = decision.summary()
    assert summary["id"] == wanted
    difference = summary["loss_with"] - summary["loss_without"]
    assert abs(difference) > 2 * summary["standard_error"]
    assert (difference < 0) == (wanted == 0)


@pytest.mark.parametrize(
    ("family", "habit", "expected"),
    [("llama_tied", None, None), ("llama_tied", 0, 0), ("gemma2", None, 0), ("gemma3_text", None, 0)],
)
def test_without_a_clear_difference_habit_decides(family, habit, expected, imported, token_ids, monkeypatch):
    losses = torch.tensor([3.0, 3.1, 2.9]).double()
    checkpoint, runner = open_model(imported[family])
    set_start_token_(checkpoint.tokenizer, habit)
    unclear = [0.9, -0.4, 0.4], [-0.9, 0.4, -0.4]  # within two standard errors
    small = [0.03, 0.03, 0.04], [-0.03, -0.03, -0.04]  # beyond them, and next to nothing
    for change in (*unclear, *small):
        with_token = losses + torch.tensor(change)
        monkeypatch.setattr(start_decision, "measure_losses", lambda *_, own=with_token: (losses, own))
        decision = decide_start_token("auto", checkpoint, token_ids, runner)
        assert decision.token == expected
        assert "no clear difference" in decision.why
    for change, wanted in ((0.1, None), (-0.1, 0)):  # whatever habit says
        monkeypatch.setattr(start_decision, "measure_losses", lambda *_, own=change: (losses, losses + own))
        assert decide_start_token("auto", checkpoint, token_ids, runner).token == wanted


def test_one_window_is_not_enough_to_judge(imported, token_ids):
    checkpoint, runner = open_model(imported["llama_tied"])
    decision = decide_start_token("auto", checkpoint, token_ids[:1], runner)
    assert decision.token is None
    assert decision.measured.keys() == {"loss_without", "loss_with"}


@pytest.mark.parametrize(("mode", "expected"), [("never", None), ("always", 0)])
def test_never_and_always_are_not_measured(mode, expected, imported, token_ids, monkeypatch):
    monkeypatch.setattr(start_decision, "measure_losses", None)
    checkpoint, runner = open_model(imported["llama_tied"])
    decision = decide_start_token(mode, checkpoint, token_ids, runner)
    assert (decision.token, decision.measured) == (expected, {})


def test_a_tokenizer_without_a_start_token(imported, token_ids):
    checkpoint, runner = open_model(imported["llama_tied"])
    checkpoint.tokenizer.bos_token = checkpoint.tokenizer.eos_token = None
    assert decide_start_token("auto", checkpoint, token_ids, runner).token is None
    with pytest.raises(
        StartTokenError, match=r"start_token='always': the tokenizer has neither BOS nor EOS\. Use auto"
    ):
        decide_start_token("always", checkpoint, token_ids, runner)
