"""Plain folders and pairs of folders are evaluated as their own classes compute them."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.evaluation.texts import main
from pipeline.runtime.errors import PipelineError
from pipeline.text.start_token import set_start_token_
from tests.conftest import PROSE_FILE
from tests.export.test_folder import make_export

NAME = PROSE_FILE.name


@pytest.fixture
def evaluate(monkeypatch, capsys):
    def run(*words):
        options = ["--text", PROSE_FILE, "--length", 32, "--windows", 3]
        monkeypatch.setattr("sys.argv", ["evaluate", *map(str, [*words, *options])])
        main()
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def export(imported, tmp_path_factory):
    return make_export(imported, tmp_path_factory.mktemp("folders"))[0]


def compute_log_p(folder):
    """Return the log-probabilities [3, 31, V] of a plain model and its targets, by the model's own class."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROSE_FILE.read_text(), add_special_tokens=False)["input_ids"][:96]
    ids = torch.tensor(ids).view(3, 32)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    return logits[:, :-1].float().log_softmax(-1), ids[:, 1:, None]


def test_a_plain_model_has_the_perplexity_of_its_own_class(model_folders, evaluate):
    folder = model_folders["llama_tied"]
    log_p, targets = compute_log_p(folder)
    expected = math.exp(-log_p.gather(-1, targets).double().mean())
    assert evaluate(folder)["perplexity"][NAME] == pytest.approx(expected, rel=1e-5)


def test_a_plain_model_reads_the_start_token_that_its_tokenizer_adds(model_folders, evaluate, tmp_path):
    first = model_folders["llama_tied"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(first), AutoTokenizer.from_pretrained(first)
    _, targets = compute_log_p(first)
    start = tokenizer.eos_token_id
    set_start_token_(tokenizer, start)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor(tokenizer(PROSE_FILE.read_text(), add_special_tokens=False)["input_ids"][:96]).view(3, 32)
    with torch.no_grad():
        log_p = model(torch.nn.functional.pad(ids, (1, 0), value=start)).logits[:, 1:-1].log_softmax(-1)
    expected = math.exp(-log_p.gather(-1, targets).double().mean())
    assert evaluate(tmp_path)["perplexity"][NAME] == pytest.approx(expected, rel=1e-5)


def test_a_model_against_itself_has_ratio_1_and_divergence_0(model_folders, export, evaluate):
    for folder in (model_folders["llama_tied"], export):
        results = evaluate(folder, "--original", folder)
        assert results["ratio"] == {NAME: 1.0}
        assert results["kl"] == {NAME: 0.0}
        assert results["top1_agreement"] == {NAME: 1.0}
        assert results["original"]["perplexity"] == results["perplexity"]


def test_an_export_against_its_original(model_folders, export, evaluate):
    original = model_folders["llama_tied"]
    results, alone = evaluate(export, "--original", original), evaluate(export)
    assert results["perplexity"] == alone["perplexity"]
    assert results["quantizers_fired"] == alone["quantizers_fired"]
    assert results["original"]["perplexity"] == evaluate(original)["perplexity"]
    ratio = results["perplexity"][NAME] / results["original"]["perplexity"][NAME]
    assert results["ratio"][NAME] == pytest.approx(ratio, abs=1e-3)
    assert results["kl"][NAME] > 0


def test_two_plain_models_diverge_as_defined(model_folders, evaluate, tmp_path):
    first = model_folders["llama_tied"]
    model = AutoModelForCausalLM.from_pretrained(first)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.3)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(first).save_pretrained(tmp_path)
    variant, original = compute_log_p(tmp_path)[0], compute_log_p(first)[0]
    expected = (original.exp() * (original - variant)).sum(-1).double().mean().item()
    results = evaluate(tmp_path, "--original", first)
    assert results["kl"][NAME] == pytest.approx(expected, abs=2e-5)
    assert results["kl"][NAME] > 1e-4


def test_refusals(model_folders, export, evaluate, tmp_path):
    plain = model_folders["llama_tied"]
    with pytest.raises(PipelineError, match=r"--tasks: .* is a plain model"):
        evaluate(plain, "--tasks", "piqa")
    with pytest.raises(PipelineError, match="--arithmetic=integer: a plain model"):
        evaluate(plain, "--arithmetic", "integer")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.add_tokens(["<another>"])
    AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(PipelineError, match=r"--original=.*its tokenizer differs from that of"):
        evaluate(export, "--original", tmp_path)
