"""Documents sampled from a model: their distribution, their bytes, killed runs, and refusals."""

import itertools
import json

import pytest
import torch

from pipeline.inference.prefixed_model import assemble_model
from pipeline.inference.sampling import Sampler, SamplingError, draw_tokens, find_beginning, find_ends, write_corpus
from pipeline.models.checkpoint import Checkpoint
from pipeline.runtime.artifacts import make_header
from pipeline.text.params import GenerationParams
from tests.conftest import make_tokenizer

PARAMS = GenerationParams(tokens=600, length=24, batch_size=8)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[model] {% endif %}"
)


@pytest.fixture(scope="module", params=["llama_tied", "mistral"])  # the second has a sliding window
def checkpoint(imported, request):
    return Checkpoint(imported[request.param], "model")


@pytest.fixture(scope="module")
def model(checkpoint):
    return assemble_model(checkpoint)


def make_sampler(model, checkpoint, **changes):
    return Sampler(model, checkpoint.tokenizer, PARAMS.model_copy(update=changes), "mine")


def sample_slowly(sampler, number):
    """Sample one document alone and without a cache, reading the whole text again for every token."""
    params = sampler.params
    generator = torch.Generator().manual_seed(params.seed * 1_000_000_007 + number)
    uniforms = torch.rand(params.length, generator=generator, dtype=torch.float64)
    document = []
    for uniform in uniforms:
        token_ids = torch.tensor([sampler.beginning + document])
        with torch.no_grad():
            logits = sampler.model(input_ids=token_ids).logits[0, -1, : len(sampler.tokenizer)]
        p = (logits / params.temperature).softmax(-1).tolist()
        order = sorted(range(len(p)), key=lambda i: -p[i]) if params.top_p < 1 else list(range(len(p)))
        left, mass = [], 0.0
        for i in order:
            if mass < params.top_p or params.top_p == 1:
                left.append(i)
            mass += p[i]
        target = float(uniform) * sum(p[i] for i in left)
        sums = itertools.accumulate(p[i] for i in left)
        drawn = next(i for i, total in zip(left, sums, strict=True) if total > target)
        if drawn in sampler.ends:
            break
        document.append(drawn)
    return document


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "top_p": 0.8}])
def test_a_batch_equals_documents_sampled_one_by_one_without_a_cache(changes, model, checkpoint):
    sampler = make_sampler(model, checkpoint, **changes)
    documents = sampler.sample_batch(1)
    assert documents == [sample_slowly(sampler, number) for number in range(8, 16)]
    assert sum(map(len, documents)) > 60


def test_finished_documents_leave_the_batch_and_change_no_other(model, checkpoint):
    sampler = make_sampler(model, checkpoint)
    before = sampler.sample_batch(0)
    sampler.ends.add(before[0][3])
    after = sampler.sample_batch(0)
    for document, shorter in zip(before, after, strict=True):
        end = document.index(before[0][3]) if before[0][3] in document else len(document)
        assert shorter == document[:end]
    assert len(after[0]) <= 3


def test_draws_follow_the_distribution_and_top_p_cuts_its_tail():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20000, 3)
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(draw_tokens(logits, uniforms, 1.0, 1.0), minlength=3) / 20000
    # Largest deviation measured: 0.004.
    torch.testing.assert_close(counts, logits[0].softmax(-1), atol=0.01, rtol=0)
    # The two likeliest have 0.665 and 0.245: 0.66 leaves one, 0.67 leaves both.
    assert set(draw_tokens(logits, uniforms, 1.0, 0.66).tolist()) == {2}
    assert set(draw_tokens(logits, uniforms, 1.0, 0.67).tolist()) == {1, 2}


def test_top_p_sorts_all_tokens_where_the_likeliest_do_not_suffice(monkeypatch):
    monkeypatch.setattr("pipeline.inference.sampling._LIKELIEST", 2)
    logits, uniforms = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 65)[:-1]
    few = draw_tokens(logits, uniforms.double(), 1.0, 0.9)
    monkeypatch.undo()
    assert torch.equal(few, draw_tokens(logits, uniforms.double(), 1.0, 0.9))


def test_a_uniform_number_next_to_one_takes_a_token_that_has_a_probability():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert draw_tokens(logits, torch.tensor([1 - 2**-53], dtype=torch.float64), 1.0, 1.0).tolist() == [1]


def write(model, checkpoint, tmp_path, name="out", **changes):
    sampler = make_sampler(model, checkpoint, **changes)
    header = make_header("generation", sampler.params.model_dump(), {"model": checkpoint.header})
    folder, work = tmp_path / name, tmp_path / "work"
    folder.mkdir()
    work.mkdir(exist_ok=True)
    metrics = write_corpus(sampler, folder, work, header)
    return metrics, {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_corpus_has_the_tokens_asked_for_and_the_same_bytes_after_a_kill(model, checkpoint, tmp_path, monkeypatch):
    metrics, first = write(model, checkpoint, tmp_path)
    assert metrics["tokens"] >= PARAMS.tokens
    assert metrics["sampled_tokens"] >= metrics["tokens"]
    assert metrics["tokens_per_second"] > 0
    rows = [json.loads(line)["text"] for name in sorted(first) for line in first[name].decode().splitlines()]
    assert len(rows) == sum(metrics[split]["documents"] for split in ("train", "validation", "test")) == len(set(rows))

    for path in (tmp_path / "work").iterdir():
        path.unlink()
    sample, calls = Sampler.sample_batch, []

    def fail_in_the_third(sampler, batch, title):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(sampler, batch, title)

    monkeypatch.setattr(Sampler, "sample_batch", fail_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        write(model, checkpoint, tmp_path, "killed")
    continued, second = write(model, checkpoint, tmp_path, "continued")
    assert calls[:4] == [0, 1, 2, 2]
    assert second == first
    assert continued["sampled_tokens"] == metrics["sampled_tokens"]


def test_another_seed_gives_other_documents(model, checkpoint):
    first, second = (make_sampler(model, checkpoint, seed=seed).sample_batch(0) for seed in (0, 1))
    assert first != second


def test_a_model_that_only_repeats_itself_is_refused_with_the_counts(model, checkpoint, tmp_path):
    with pytest.raises(
        SamplingError, match=r"corpora.mine.generation: of \d+ tokens only \d+ .*near_duplicate [1-9]\d*\)\. Raise"
    ):
        write(model, checkpoint, tmp_path, temperature=1e-6, length=64)


def test_documents_too_long_for_the_model_are_refused(model, checkpoint):
    with pytest.raises(SamplingError, match=r"corpora.mine.generation.length=\d+: .* Use at most"):
        make_sampler(model, checkpoint, length=10**6)


def test_beginnings_follow_the_tokenizer():
    tokenizer = make_tokenizer()
    with pytest.raises(SamplingError, match="beginning=chat_template: the tokenizer has no chat template"):
        find_beginning(tokenizer, "chat_template", 10**6)
    tokenizer.chat_template = TEMPLATE
    text = tokenizer.decode(find_beginning(tokenizer, "chat_template", 10**6))
    assert text == "[user] \n[model] "
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    bare = find_beginning(tokenizer, "end_of_text", 10**6)
    assert bare in ([separator], [tokenizer.bos_token_id])


def test_ends_come_from_tokenizer_and_generation_config(model, checkpoint):
    model.generation_config.eos_token_id = [11, 12]
    assert {11, 12} <= find_ends(model, checkpoint.tokenizer)
    model.generation_config.eos_token_id = None
