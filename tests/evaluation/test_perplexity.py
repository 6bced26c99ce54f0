"""Perplexity and agreement equal their definitions, whichever way they are computed."""

import json
import math
from collections import Counter

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.evaluation import perplexity
from pipeline.evaluation.perplexity import (
    NonFiniteError,
    Original,
    QuantizerCountError,
    Scores,
    evaluate_windows,
    score_hidden,
)
from pipeline.runtime.artifacts import ArtifactError, make_header, save_tensors
from pipeline.text.windows import prepend_start_token
from tests.conftest import make_model, open_model


@torch.no_grad()
def three_line_loop(model, token_ids):
    logits = model(token_ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())
    return math.exp(losses.item())


def original_of(checkpoint, runner, windows, path):
    _, tensors, _ = evaluate_windows(checkpoint, windows, runner, prefix_kv=None)
    save_tensors(path, tensors, make_header("evaluation", {"variant": "original"}, {"checkpoint": checkpoint.header}))
    return Original(checkpoint, path)


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "gemma3_text"])
def test_a_start_token_is_read_but_is_not_a_target(family, imported, token_ids):
    """The loss equals transformers' loss on [start] + content, with content after its first token as targets."""
    checkpoint, runner = open_model(imported[family])
    plain, *_ = evaluate_windows(checkpoint, {"a": token_ids}, runner, prefix_kv=None)
    metrics, tensors, _ = evaluate_windows(checkpoint, {"a": token_ids}, runner, prefix_kv=None, text_start_token_id=0)
    model = make_model(family)
    ids = prepend_start_token(token_ids, 0)
    labels = ids.clone()
    labels[:, :2] = -100
    with torch.no_grad():
        loss = model(ids, labels=labels).loss.item()
        states = model.model(ids).last_hidden_state[:, 1:]
    assert metrics["perplexity"]["a"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert metrics["perplexity"]["a"] != pytest.approx(plain["perplexity"]["a"], rel=1e-3)
    assert (tensors["hidden.a"] - states).abs().max() <= 1e-5 * states.abs().max()
    assert torch.equal(tensors["token_ids.a"], token_ids)
    assert metrics["settings"]["targets_per_window"] == plain["settings"]["targets_per_window"] == 23
    assert plain["settings"]["special_tokens"] == "none added"
    assert metrics["settings"]["special_tokens"] == "start token (id 0) before each window"


def test_a_prefix_of_the_start_token_equals_the_original_reading_it(imported, token_ids, tmp_path):
    """Its windows have no start token of their own, and the same positions of content are compared."""
    checkpoint, runner = open_model(imported["gemma3_text"])
    windows = {"a": token_ids}
    expected, tensors, _ = evaluate_windows(checkpoint, windows, runner, prefix_kv=None, text_start_token_id=0)
    header = make_header("evaluation", {"variant": "original"}, {"checkpoint": checkpoint.header})
    save_tensors(tmp_path / "original.safetensors", tensors, header)
    original = Original(checkpoint, tmp_path / "original.safetensors")
    prefix_kv = compute_prefix_kv(checkpoint, checkpoint.embed(torch.tensor([0])), runner)
    metrics, *_ = evaluate_windows(checkpoint, windows, runner, prefix_kv=prefix_kv, original=original)
    assert metrics["perplexity"]["a"] == pytest.approx(expected["perplexity"]["a"], rel=1e-5)
    assert metrics["kl"]["a"] == pytest.approx(0, abs=1e-6)
    assert metrics["top1_agreement"]["a"] == 1
    doubled, *_ = evaluate_windows(
        checkpoint, windows, runner, prefix_kv=prefix_kv, original=original, text_start_token_id=0
    )
    assert doubled["kl"]["a"] > 1e-3


@pytest.mark.parametrize("family", ["llama_tied", "qwen3"])
def test_perplexity_equals_a_three_line_loop(family, imported, token_ids):
    checkpoint, runner = open_model(imported[family])
    windows = {"a": token_ids[:2], "b": token_ids[2:]}
    metrics, tensors, _ = evaluate_windows(checkpoint, windows, runner, prefix_kv=None)
    for name, ids in windows.items():
        assert metrics["perplexity"][name] == pytest.approx(three_line_loop(make_model(family), ids), rel=1e-5)
        losses = tensors[f"loss.{name}"]
        assert losses.shape == (len(ids),)
        if name == "a":  # two windows: half their difference, times the perplexity
            expected = metrics["perplexity"]["a"] * (losses[0] - losses[1]).abs().item() / 2
            assert metrics["standard_error"]["a"] == pytest.approx(expected, rel=1e-3)
    assert "b" not in metrics["standard_error"]  # a single window has no spread
    assert metrics["settings"]["targets_per_window"] == 23
    assert "kl" not in metrics
    json.dumps(metrics)


def test_scores_do_not_depend_on_the_slices_of_positions(imported, token_ids, monkeypatch):
    checkpoint, runner = open_model(imported["llama_tied"])
    _, tensors, _ = evaluate_windows(checkpoint, {"a": token_ids}, runner, prefix_kv=None)
    head = checkpoint.load_lm_head()
    whole = score_hidden(tensors["hidden.a"], head, token_ids, (tensors["hidden.a"] + 0.1, head))
    monkeypatch.setattr(perplexity, "LOGIT_POSITIONS", 5)
    sliced = score_hidden(tensors["hidden.a"], head, token_ids, (tensors["hidden.a"] + 0.1, head))
    assert torch.allclose(whole.losses, sliced.losses, rtol=1e-6)
    assert (sliced.kl, sliced.top1_agreement) == (pytest.approx(whole.kl, rel=1e-5), whole.top1_agreement)


def test_divergence_and_agreement_equal_their_definitions(imported, token_ids, tmp_path):
    first, runner = open_model(imported["llama_tied"])
    second, other_runner = open_model(imported["qwen2"])
    original = original_of(first, runner, {"a": token_ids}, tmp_path / "original.safetensors")
    metrics, *_ = evaluate_windows(second, {"a": token_ids}, other_runner, prefix_kv=None, original=original)
    with torch.no_grad():
        p, q = (make_model(name)(token_ids).logits[:, :-1].softmax(-1).double() for name in ("llama_tied", "qwen2"))
    assert metrics["kl"]["a"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert metrics["top1_agreement"]["a"] == pytest.approx(
        (p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1e-4
    )
    same, *_ = evaluate_windows(first, {"a": token_ids}, runner, prefix_kv=None, original=original)
    assert same["kl"]["a"] == pytest.approx(0, abs=1e-6)
    assert same["top1_agreement"]["a"] == 1


def test_comparison_with_other_windows_or_another_model_is_refused(imported, token_ids, tmp_path):
    checkpoint, runner = open_model(imported["llama_tied"])
    original = original_of(checkpoint, runner, {"a": token_ids}, tmp_path / "original.safetensors")
    with pytest.raises(ArtifactError, match=r"was made with other windows of a\. Rerun: dvc repro"):
        evaluate_windows(checkpoint, {"a": token_ids.flip(0)}, runner, prefix_kv=None, original=original)
    other, _ = open_model(imported["qwen2"])
    with pytest.raises(ArtifactError, match="was made from another checkpoint"):
        Original(other, tmp_path / "original.safetensors")


def test_a_quantizer_that_does_not_fire_raises(imported, token_ids, monkeypatch):
    checkpoint, runner = open_model(imported["llama_tied"])
    expected = Counter({"weights": 7, "activations": 4, "keys": 1, "values": 1})
    monkeypatch.setattr(perplexity, "count_expected_quantizers", lambda settings: expected)
    with pytest.raises(QuantizerCountError, match=r"fired: \{\}. The params ask for .*'activations': 12"):
        evaluate_windows(checkpoint, {"a": token_ids}, runner, prefix_kv=None)


def test_non_finite_hidden_states_raise(imported, token_ids, monkeypatch):
    checkpoint, runner = open_model(imported["llama_tied"])
    embed = checkpoint.embed
    monkeypatch.setattr(checkpoint, "embed", lambda ids: embed(ids) * float("inf"))
    with pytest.raises(NonFiniteError, match="not finite"):
        evaluate_windows(checkpoint, {"a": token_ids}, runner, prefix_kv=None)


@pytest.mark.parametrize("loss", [1e4, torch.inf, torch.nan])
def test_a_loss_beyond_any_perplexity_raises(loss):
    """exp(1e4) overflows, and JSON has neither infinity nor NaN."""
    scores = Scores(torch.tensor([1.0, loss], dtype=torch.float64), None, None)
    with pytest.raises(NonFiniteError, match="nats a token has no finite perplexity"):
        _ = scores.perplexity
