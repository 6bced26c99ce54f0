"""Several callers of one model, and copies of caches: each call gives the same result as it would alone."""

import copy
import io
import pickle
import threading

import pytest
import torch

from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.inference.prefixed_model import assemble_model
from tests.inference.test_prefixed_model import make_quantized, pad, prefixed

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
GENERATOR = torch.Generator().manual_seed(21)
TEXTS = [torch.randint(2, 320, (1, length), generator=GENERATOR) for length in (9, 33, 50, 4)]
FAMILIES = ["llama_untied_biases", "qwen2", "gemma3_text"]  # of the last two, some layers slide


@pytest.fixture(scope="module", params=FAMILIES)
def quantized(request, imported, tmp_path_factory):
    """Return a model with static, centered quantizers of keys, which need the positions of the keys."""
    changes = {"keys.centered": True, "values.centered": True}
    checkpoint, _ = make_quantized(imported, tmp_path_factory.mktemp(request.param), request.param, changes)
    model = assemble_model(checkpoint, load_prefix_kv(checkpoint.folder, checkpoint.stage))
    assert all(block.self_attn.key_quantizer.mean_taken_out for block in model.model.layers)
    model.packs_cache = request.param != FAMILIES[0]
    for block in model.model.layers:  # a mean that counts
        mean = block.self_attn.key_quantizer.mean
        block.self_attn.key_quantizer.mean = mean + 8 * torch.randn(mean.shape, generator=GENERATOR)
    return model


def save_and_load(cache):
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache)), "save": save_and_load}


@pytest.mark.parametrize("steps", [[1] * 6, [6], [2, 4]])
@pytest.mark.parametrize("kind", COPIES)
@torch.no_grad()
def test_a_copied_cache_continues_as_its_original(quantized, kind, steps):
    """Follow transformers' recipe for a shared beginning. Texts of another length pass through the model in between."""
    beginning, rest = TEXTS[1][:, :27], TEXTS[1][:, 27:]

    def read_rest(cache):
        parts = rest.split(steps, dim=1)
        return torch.cat([quantized(part, past_key_values=cache).logits for part in parts], dim=1)

    expected = read_rest(quantized(beginning).past_key_values)
    cache = quantized(beginning).past_key_values
    other = COPIES[kind](cache)
    quantized(TEXTS[2])
    assert torch.equal(read_rest(other), expected)
    assert cache.get_seq_length() == 27
    assert torch.equal(read_rest(cache), expected)
    assert torch.equal(read_rest(copy.deepcopy(quantized)(beginning).past_key_values), expected)


@torch.no_grad()
def test_generation_continues_from_a_copied_cache(quantized):
    cache = quantized(TEXTS[1][:, :20]).past_key_values
    for text in (TEXTS[1], torch.cat((TEXTS[1][:, :20], TEXTS[0]), dim=1)):
        expected = quantized.generate(text, past_key_values=quantized(TEXTS[1][:, :20]).past_key_values, **GREEDY)
        assert torch.equal(quantized.generate(text, past_key_values=copy.deepcopy(cache), **GREEDY), expected)


@torch.no_grad()
def test_a_cache_belongs_to_a_text_not_to_a_model(quantized):
    """A cache that a copy of the model has filled is continued by the model itself."""
    expected = quantized(TEXTS[1][:, 27:], past_key_values=quantized(TEXTS[1][:, :27]).past_key_values).logits
    other = copy.deepcopy(quantized)
    cache = other(TEXTS[1][:, :27]).past_key_values
    del other
    assert torch.equal(quantized(TEXTS[1][:, 27:], past_key_values=cache).logits, expected)


@torch.no_grad()
def test_interleaved_texts_equal_single_ones(quantized):
    """Read the texts token by token in turn, each in its own cache."""
    alone = []
    for text in TEXTS:
        cache = quantized.make_cache()
        steps = [quantized(text[:, step : step + 1], past_key_values=cache).logits for step in range(text.shape[1])]
        alone.append(torch.cat(steps, dim=1))
    caches, found = [quantized.make_cache() for _ in TEXTS], [[] for _ in TEXTS]
    for step in range(50):
        for text, cache, logits in zip(TEXTS, caches, found, strict=True):
            if step < text.shape[1]:
                logits.append(quantized(text[:, step : step + 1], past_key_values=cache).logits)
    for logits, expected in zip(found, alone, strict=True):
        assert torch.equal(torch.cat(logits, dim=1), expected)


def test_threads_generate_the_same_as_alone(quantized):
    expected = [quantized.generate(text, **GREEDY) for text in TEXTS]
    wrong = []

    def repeat(text, result):
        for _ in range(3):
            if not torch.equal(quantized.generate(text, **GREEDY), result):
                wrong.append(text.shape)

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(TEXTS, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_reordered_and_selected_rows_of_a_cache(quantized):
    """Swap, repeat and drop rows as beam search does. Each row keeps its padding."""
    rows = [text[0, :27].tolist() for text in TEXTS[:3]]
    token_ids, mask = pad(rows, "left")
    following = torch.tensor([[5, 6], [7, 8], [9, 10]])

    def read(cache, mask, order):
        longer = torch.cat((mask, mask.new_ones(len(mask), 2)), dim=1)
        return quantized(following[order], attention_mask=longer, past_key_values=cache).logits

    cache = quantized(token_ids, attention_mask=mask).past_key_values
    expected = read(copy.deepcopy(cache), mask, [0, 1, 2])
    order = torch.tensor([2, 0, 1])
    for change, chosen in (
        (lambda cache: cache.reorder_cache(order), order),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), torch.tensor([1])),
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        other = copy.deepcopy(cache)
        change(other)
        found = read(other, mask[chosen], chosen)
        close = (found - expected[chosen]).abs().amax((1, 2)) <= 1e-4 * expected.abs().max()
        assert close.all()


def test_checkpointed_recomputation_equals_one_forward(quantized):
    """Autograd calls the model again in the backward pass, after other texts have passed through it."""

    def gradient(call):
        embedded = quantized.get_input_embeddings()(TEXTS[1]).detach().requires_grad_()
        logits = call(embedded)
        quantized(TEXTS[2])
        logits.float().square().sum().backward()
        return embedded.grad

    def read(embedded):
        return quantized(inputs_embeds=embedded, use_cache=False).logits

    found = gradient(lambda embedded: torch.utils.checkpoint.checkpoint(read, embedded, use_reentrant=False))
    assert torch.equal(found, gradient(read))


@torch.no_grad()
def test_calls_leave_nothing_on_modules(quantized):
    """Apart from weights that were dequantized: they depend on no call."""

    def describe():
        kept = {"_dequantized", "fired"}
        return {
            name: {key for key, value in vars(module).items() if value is not None and key not in kept}
            for name, module in quantized.named_modules()
        }

    before = describe()
    quantized.generate(TEXTS[0], **GREEDY)
    assert describe() == before


@torch.no_grad()
def test_packed_caches_give_the_tokens_of_plain_ones(quantized):
    """Padded batches, beams, tokens that are taken back, a conversation that goes on: through both kinds of caches."""
    model = copy.deepcopy(quantized)
    token_ids, mask = pad([text[0].tolist() for text in TEXTS], "left")
    repeated = torch.cat([TEXTS[0]] * 4, dim=1)
    outputs = []
    for packed in (True, False):
        model.packs_cache = packed
        cache = model.make_cache()
        assert all(layer.packed == packed for layer in cache.layers)
        first = model.generate(TEXTS[1], past_key_values=cache, **GREEDY)
        outputs.append(
            [
                model.generate(token_ids, attention_mask=mask, pad_token_id=1, **GREEDY),
                model.generate(token_ids, attention_mask=mask, pad_token_id=1, num_beams=3, **GREEDY),
                model.generate(repeated, prompt_lookup_num_tokens=3, **GREEDY),
                model.generate(torch.cat((first, TEXTS[3]), dim=1), past_key_values=cache, **GREEDY),
            ]
        )
    for found, expected in zip(*outputs, strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_a_call_without_a_cache_packs_nothing(quantized, monkeypatch):
    monkeypatch.setattr(quantized, "packs_cache", True)
    monkeypatch.setattr("pipeline.blocks.kv_cache.pack_states", None)
    expected = quantized(TEXTS[1], use_cache=False).logits
    monkeypatch.undo()
    assert torch.equal(quantized(TEXTS[1], past_key_values=quantized.make_cache(packed=True)).logits, expected)


@torch.no_grad()
def test_a_beginning_shared_by_models_with_a_prefix_alone(imported):
    model, _, _ = prefixed(imported, "gemma3_text")
    cache = model(TEXTS[2][:, :40]).past_key_values
    other = copy.deepcopy(cache)
    first = model(TEXTS[2][:, 40:], past_key_values=cache).logits
    assert torch.equal(model(TEXTS[2][:, 40:], past_key_values=other).logits, first)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_rows_of_a_cache_that_has_read_nothing(quantized, packed):
    """Its length counts the prefix, which has no rows yet."""
    expected = quantized(TEXTS[0]).logits
    cache = quantized.make_cache(packed)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([1]))
    cache.reorder_cache(torch.tensor([0]))
    cache.crop(-2)
    assert torch.equal(quantized(TEXTS[0], past_key_values=cache).logits, expected)


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(imported):
    """Not one of its tokens would be at its place, and no error would say so."""
    model, original, _ = prefixed(imported)
    cache = model(TEXTS[0]).past_key_values
    with pytest.raises(ValueError, match="is a PrefixCache, which only the model that made it can read"):
        original(TEXTS[3], past_key_values=cache)
    shorter, other = copy.deepcopy(model), copy.deepcopy(model)
    shorter.model.layers, shorter.prefix_kv = shorter.model.layers[:2], shorter.prefix_kv[:2]
    other.prefix_kv = other.prefix_kv[..., 1:, :]
    for reader, message in (
        (shorter, "This model has 2 layers"),
        (other, r"prefix of shape \[2, 2, 2, 12\]. Pass None"),
    ):
        with pytest.raises(ValueError, match=message):
            reader(TEXTS[3], past_key_values=cache)
    assert cache.get_seq_length() == TEXTS[0].shape[1]
