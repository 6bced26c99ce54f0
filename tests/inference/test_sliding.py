"""A model whose layers slide, with a prefix, however it is fed: the original reading prefix + text in one forward."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig, Qwen3Config

from pipeline.blocks.kv_cache import SlidingLayer
from pipeline.blocks.prefix_kv import compute_prefix_kv, load_prefix_kv
from pipeline.blocks.quantized import QuantizedLinear
from pipeline.importing.import_model import import_model
from pipeline.inference.prefixed_model import assemble_model
from tests.blocks.test_walk import walked_logits
from tests.conftest import SIZES, SLIDING, WINDOW, make_tokenizer, open_model, randomize_
from tests.inference.test_prefixed_model import PAD, PREFIX, QUANTIZERS, make_quantized, pad, prefixed

GENERATOR = torch.Generator().manual_seed(11)
TEXTS = [torch.randint(2, 320, (length,), generator=GENERATOR).tolist() for length in (72, 41, 5, 30)]
STEPS = {"token by token": [1] * 72, "in parts": [10, 1, 30, 1, 1, 29], "prompt and tokens": [50] + [1] * 22}


@torch.no_grad()
def reference(original, embeddings, text):
    """Return the logits [T, V] of one text after the prefix, in one forward of transformers' own model."""
    embedded = torch.cat((embeddings, original.model.embed_tokens(torch.tensor(text))))
    return original(inputs_embeds=embedded[None], use_cache=False).logits[0, len(embeddings) :]


def greedy(original, embeddings, text, count):
    text = list(text)
    for _ in range(count):
        text.append(reference(original, embeddings, text)[-1].argmax().item())
    return text


def assert_close(found, expected):
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()  # measured: at most 4e-6


def count_kept(cache):
    """Return the number of positions that each sliding layer keeps."""
    return {layer.keys.shape[2] for layer in cache.layers if isinstance(layer, SlidingLayer)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SLIDING)
@torch.no_grad()
def test_a_padded_batch_at_once(imported, family, side):
    model, original, embeddings = prefixed(imported, family, continuous=True)
    token_ids, mask = pad(TEXTS, side)
    output = model(token_ids, attention_mask=mask)
    for row, text in enumerate(TEXTS):
        assert_close(output.logits[row][mask[row].bool()], reference(original, embeddings, text))
    # The prefix stands before the padding, and the third text is so short that its next token sees the prefix.
    assert count_kept(output.past_key_values) == {3 + 72}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("family", SLIDING)
@torch.no_grad()
def test_fed_in_steps_with_memory_bounded(imported, family, steps):
    model, original, embeddings = prefixed(imported, family)
    cache, logits, start = model.make_cache(), [], 0
    for step in STEPS[steps]:
        ids = torch.tensor([TEXTS[0][start : start + step]])
        logits.append(model(ids, past_key_values=cache).logits[0])
        start += step
        assert count_kept(cache) == {min(3 + start, WINDOW - 1)}
        assert cache.get_seq_length() == start
    assert_close(torch.cat(logits), reference(original, embeddings, TEXTS[0]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SLIDING)
@torch.no_grad()
def test_a_padded_batch_continues_token_by_token(imported, family, side):
    """Padding on the right is then in the middle of the texts. A window counts only text."""
    model, original, embeddings = prefixed(imported, family)
    token_ids, mask = pad([text[: len(text) - 4] for text in TEXTS], side)
    cache = model(token_ids, attention_mask=mask).past_key_values
    for step in range(4):
        mask = torch.cat((mask, mask.new_ones(len(TEXTS), 1)), dim=1)
        ids = torch.tensor([[text[len(text) - 4 + step]] for text in TEXTS])
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits
        for row, text in enumerate(TEXTS):
            expected = reference(original, embeddings, text)[len(text) - 4 + step]
            assert_close(logits[row, 0], expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", SLIDING)
def test_greedy_generation_of_a_padded_batch(imported, family, use_cache):
    model, original, embeddings = prefixed(imported, family)
    texts = [TEXTS[1], TEXTS[2], TEXTS[3][:25]]  # beyond the window from the start, never, on the way
    token_ids, mask = pad(texts, "left")
    found = model.generate(
        token_ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=use_cache
    )
    for row, text in zip(found, texts, strict=True):
        assert row[-len(text) - 6 :].tolist() == greedy(original, embeddings, text, 6)


@pytest.mark.parametrize("family", SLIDING)
def test_beams_keep_their_own_past(imported, family):
    """The likelihood by which a beam was chosen, step by step in the cache, equals one forward over its text."""
    model, original, embeddings = prefixed(imported, family)
    token_ids, mask = pad([TEXTS[1], TEXTS[3][:25]], "left")
    config = GenerationConfig(
        max_new_tokens=8,
        num_beams=4,
        num_return_sequences=3,
        eos_token_id=None,
        pad_token_id=PAD,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = model.generate(token_ids, attention_mask=mask, generation_config=config)
    for row, (sequence, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
        text = sequence[41 - (41, 25)[row // 3] :].tolist()
        likelihoods = reference(original, embeddings, text).log_softmax(-1)[-9:-1]
        expected = likelihoods.gather(1, torch.tensor(text[-8:])[:, None]).sum() / 8
        assert score == pytest.approx(expected.item(), abs=1e-4)
    assert len({tuple(sequence.tolist()) for sequence in found.sequences}) == 6


def test_beams_of_a_padded_batch_are_those_of_each_text_alone(imported):
    """In bfloat16 this holds for no model: padding changes the order of additions, the original's too."""
    model, _, _ = prefixed(imported, "mistral")
    texts = [TEXTS[2], TEXTS[1][:36], TEXTS[3]]
    token_ids, mask = pad(texts, "left")
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 3, "do_sample": False, "pad_token_id": PAD}
    batch = model.generate(token_ids, attention_mask=mask, eos_token_id=None, **options)
    for row, text in enumerate(texts):
        alone = model.generate(torch.tensor([text]), eos_token_id=None, **options)
        assert torch.equal(batch[3 * row : 3 * row + 3, -5:], alone[:, -5:])


@pytest.mark.parametrize("family", SLIDING)
def test_tokens_guessed_ahead_are_taken_back(imported, family):
    """Prompt lookup guesses from a text that repeats itself, and crops the cache where it was wrong."""
    model, original, embeddings = prefixed(imported, family)
    text = (TEXTS[0][:12] * 4)[:45]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = model.generate(torch.tensor([text]), prompt_lookup_num_tokens=4, **options)
    assert found[0].tolist() == greedy(original, embeddings, text, 8)


@pytest.mark.parametrize("length", [5, 25, 45])
@pytest.mark.parametrize("assistant", ["itself", "another with a prefix", "one without"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma3_text"])
def test_an_assistant_changes_no_token(imported, family, assistant, length):
    """The assistant guesses several tokens, and removes wrong ones from its own cache."""
    model, original, embeddings = prefixed(imported, family)
    helper = model
    if assistant == "another with a prefix":  # guesses that are often wrong
        helper, _, _ = prefixed(imported, family)
        with torch.no_grad():
            helper.lm_head.weight.add_(0.05 * torch.randn_like(helper.lm_head.weight))
    if assistant == "one without":
        helper = original
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "assistant_model": helper}
    text = TEXTS[0][:length]
    assert model.generate(torch.tensor([text]), **options)[0].tolist() == greedy(original, embeddings, text, 14)


def test_the_cache_that_generation_returns_can_be_continued(imported):
    model, original, embeddings = prefixed(imported, "gemma3_text")
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "max_new_tokens": 5}
    for extra in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": prefixed(imported, "gemma3_text")[0]}):
        first = model.generate(torch.tensor([TEXTS[1]]), **options, **extra)
        second = model.generate(first.sequences, past_key_values=first.past_key_values, **options)
        assert second.sequences[0].tolist() == greedy(original, embeddings, TEXTS[1], 10)


def test_a_conversation_continues_in_its_cache(imported):
    model, original, embeddings = prefixed(imported, "gemma3_text")
    cache = model.make_cache()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    first = model.generate(torch.tensor([TEXTS[1]]), past_key_values=cache, **options)
    both = torch.cat((first, torch.tensor([TEXTS[3]])), dim=1)
    second = model.generate(both, past_key_values=cache, **options)
    assert second[0].tolist() == greedy(original, embeddings, both[0].tolist(), 4)
    assert count_kept(cache) == {WINDOW - 1}


@pytest.mark.parametrize("kind", ["static", "dynamic", "keys before RoPE"])
@pytest.mark.parametrize("prefix", [PREFIX, []])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text"])
@torch.no_grad()
def test_a_quantized_model_equals_the_walk(imported, tmp_path, family, kind, prefix):
    r3 = "identity" if kind == "keys before RoPE" else "hadamard"
    checkpoint, runner = make_quantized(imported, tmp_path, family, QUANTIZERS[kind], prefix, r3=r3, r5="identity")
    prefix_kv = load_prefix_kv(checkpoint.folder, checkpoint.stage)
    model = assemble_model(checkpoint, prefix_kv)
    text = torch.tensor(TEXTS[:1])
    expected = walked_logits(checkpoint, runner, text, prefix_kv)[0]
    assert agree(model(text).logits[0], expected) == 1
    token_ids, mask = pad([TEXTS[0], [5] * 80], "left")
    # A value between two integers can tip with the order of sums, and what follows then differs: not in float64.
    assert agree(model(token_ids, attention_mask=mask).logits[0, 8:], expected) >= 0.7
    model.double()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.compute_dtype = torch.float64
    cache = model.make_cache()
    steps = [model(text[:, step : step + 1], past_key_values=cache).logits[0, 0] for step in range(72)]
    assert agree(torch.stack(steps), model(text).logits[0]) == 1


def agree(found, expected):
    """Share of positions whose logits are the same."""
    return ((found - expected).abs().amax(-1) <= 1e-5 * expected.abs().max()).float().mean()


CONFIGS = {  # windows longer than the prefix, as long, shorter; one layer in three that sees everything
    "a wide window": MistralConfig(**SIZES, head_dim=20, sliding_window=9),
    "as long as the prefix": MistralConfig(**SIZES, head_dim=20, sliding_window=len(PREFIX)),
    "two positions": MistralConfig(**SIZES, head_dim=20, sliding_window=2),
    "a pattern": Qwen3Config(
        **SIZES,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
}


@pytest.mark.parametrize("prefix_length", [1, 3, 12])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_windows_shorter_and_longer_than_the_prefix(tmp_path, name, prefix_length):
    torch.manual_seed(0)
    original = randomize_(AutoModelForCausalLM.from_config(CONFIGS[name]))
    original.save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "model")
    checkpoint, runner = open_model(tmp_path / "model")
    embeddings = checkpoint.embed(torch.arange(2, 2 + prefix_length))
    model = assemble_model(checkpoint, compute_prefix_kv(checkpoint, embeddings, runner))
    for side in ("left", "right"):
        token_ids, mask = pad([TEXTS[0][:20], TEXTS[1][:3], TEXTS[2]], side)
        logits = model(token_ids, attention_mask=mask).logits
        for row, text in enumerate([TEXTS[0][:20], TEXTS[1][:3], TEXTS[2]]):
            assert_close(logits[row][mask[row].bool()], reference(original, embeddings, text))
    token_ids, mask = pad([TEXTS[0][:20], TEXTS[1][:3], TEXTS[2]], "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = model.generate(token_ids, attention_mask=mask, **options)
    for row, text in zip(found, [TEXTS[0][:20], TEXTS[1][:3], TEXTS[2]], strict=True):
        assert row[-len(text) - 6 :].tolist() == greedy(original, embeddings, text, 6)
    cache = model.make_cache()
    cache.activate_past_recording()
    model(torch.tensor([TEXTS[0][:20]]), past_key_values=cache)
    cache.crop(-7)
    again = model(torch.tensor([TEXTS[0][13:30]]), past_key_values=cache).logits[0]
    assert_close(again, reference(original, embeddings, TEXTS[0][:30])[13:])
    cache.reset()
    assert_close(
        model(torch.tensor([TEXTS[2]]), past_key_values=cache).logits[0], reference(original, embeddings, TEXTS[2])
    )
