"""The whole model with a prefix: whatever is asked of it equals the original reading the prefix's tokens first."""

import copy
import logging
from itertools import chain

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from pipeline.blocks.prefix_kv import compute_prefix_kv, load_prefix_kv
from pipeline.inference.generation import chat
from pipeline.inference.prefixed_model import assemble_model, prefix_model_, probe_saturation, strip_start_token
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.quantizer_init import init_quantizers
from pipeline.runtime.artifacts import make_header
from tests.blocks.test_walk import walked_logits
from tests.conftest import POST_NORMS, init_params, make_model, open_model
from tests.rotation.test_merging import rotate

PREFIX = [7, 9, 0]
FAMILIES = ["llama_tied", "llama_untied_biases", "mistral", "qwen2", "qwen3", *POST_NORMS]
TEXTS = [[5, 6, 8, 40, 41, 42], [90, 91, 92, 93], [17]]
PAD = 1


def prefixed(imported, family="llama_tied", continuous=False):
    """Return this project's model with a prefix, transformers' own model, and the prefix as embeddings [P, D]."""
    checkpoint, runner = open_model(imported[family])
    embeddings = checkpoint.embed(torch.tensor(PREFIX))
    if continuous:
        embeddings = embeddings + torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    model = assemble_model(checkpoint, compute_prefix_kv(checkpoint, embeddings, runner))
    return model, make_model(family), embeddings


def make_quantized(imported, folder, family="llama_tied", changes=None, prefix=PREFIX, start_token=None, **rotation):
    """Return a checkpoint as quantizer_init writes it, and a runner for it."""
    rotated, runner, _ = rotate(imported[family], folder / "rotation", **rotation)
    plain, _ = open_model(imported[family])
    ids = torch.tensor(prefix, dtype=torch.int64)
    windows = torch.randint(0, 320, (3, 24), generator=torch.Generator().manual_seed(4))
    init_quantizers(
        rotated,
        folder / "quantized",
        params=init_params({"weights.rounding": "rtn"} | (changes or {})),
        prefix_token_ids=ids,
        prefix_embeddings=plain.embed(ids),
        token_ids=windows,
        runner=runner,
        work_folder=folder / "work",
        header=make_header("quantizer_init", {}),
        text_start_token_id=start_token,
    )
    return Checkpoint(folder / "quantized", "quantizer_init"), runner


@torch.no_grad()
def reference_logits(original, embeddings, token_ids):
    """Return the logits [T, V] of transformers' forward over the prefix and one text, token by token, for the text."""
    embedded = torch.cat((embeddings, original.model.embed_tokens(torch.tensor(token_ids))))
    cache, logits = DynamicCache(config=original.config), []
    for step in embedded:
        output = original(inputs_embeds=step[None, None], past_key_values=cache, use_cache=True)
        logits.append(output.logits[0, 0])
    return torch.stack(logits[len(embeddings) :])


@torch.no_grad()
def reference_greedy(original, embeddings, token_ids, count):
    token_ids = list(token_ids)
    for _ in range(count):
        token_ids.append(reference_logits(original, embeddings, token_ids)[-1].argmax().item())
    return token_ids


def pad(texts, side):
    width = max(len(text) for text in texts)
    rows, masks = [], []
    for text in texts:
        padding = [PAD] * (width - len(text))
        rows.append(padding + text if side == "left" else text + padding)
        ones, zeros = [1] * len(text), [0] * len(padding)
        masks.append(zeros + ones if side == "left" else ones + zeros)
    return torch.tensor(rows), torch.tensor(masks)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padded_batch_equals_the_original_token_by_token(imported, family, side, continuous):
    model, original, embeddings = prefixed(imported, family, continuous)
    token_ids, mask = pad(TEXTS, side)
    logits = model(token_ids, attention_mask=mask).logits
    for row, text in enumerate(TEXTS):
        found = logits[row][mask[row].bool()]
        expected = reference_logits(original, embeddings, text)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()  # measured: 2e-6


@torch.no_grad()
def test_without_a_mask_everything_is_text(imported):
    model, original, embeddings = prefixed(imported)
    expected = reference_logits(original, embeddings, TEXTS[0])
    for options in ({}, {"use_cache": False}):
        output = model(torch.tensor(TEXTS[:1]), **options)
        assert torch.allclose(output.logits[0], expected, atol=1e-4)
        assert (output.past_key_values is None) == ("use_cache" in options)


@pytest.mark.parametrize("family", ["llama_tied", "qwen3"])
@torch.no_grad()
def test_a_cache_is_continued_and_counts_the_text_alone(imported, family):
    model, original, embeddings = prefixed(imported, family)
    expected = reference_logits(original, embeddings, TEXTS[0])
    token_ids = torch.tensor(TEXTS[:1])
    first = model(token_ids[:, :2])
    cache = first.past_key_values
    assert cache.get_seq_length() == 2
    assert cache.layers[0].keys.shape[-2] == 2 + len(PREFIX)
    second = model(token_ids[:, 2:5], past_key_values=cache)
    third = model(token_ids[:, 5:], cache=second.past_key_values, attention_mask=torch.ones(1, 6))  # its newer name
    logits = torch.cat([output.logits[0] for output in (first, second, third)])
    assert torch.allclose(logits, expected, atol=1e-4)
    cache.crop(-4)
    assert cache.get_seq_length() == 2
    again = model(token_ids[:, 2:], past_key_values=cache)
    assert torch.allclose(again.logits[0], expected[2:], atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_of_a_padded_batch_equals_the_original(imported, family, use_cache):
    model, original, embeddings = prefixed(imported, family)
    token_ids, mask = pad(TEXTS, "left")
    found = model.generate(
        token_ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=use_cache
    )
    for row, text in enumerate(TEXTS):
        assert found[row].tolist()[-len(text) - 6 :] == reference_greedy(original, embeddings, text, 6)


def test_beams_and_samples_equal_the_original_reading_the_prefix(imported):
    """Texts have one length, and the original reads prefix and text as a prompt."""
    model, original, _ = prefixed(imported)
    ours, theirs = torch.tensor(TEXTS[:1]), torch.tensor([PREFIX + TEXTS[0]])
    for options in (
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "temperature": 0.8, "top_k": 0, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True, "top_k": 0},
    ):
        config = GenerationConfig(max_new_tokens=8, eos_token_id=None, pad_token_id=PAD, **options)
        torch.manual_seed(3)
        found = model.generate(ours, attention_mask=torch.ones_like(ours), generation_config=config)
        torch.manual_seed(3)
        expected = original.generate(theirs, attention_mask=torch.ones_like(theirs), generation_config=config)
        assert torch.equal(found, expected[:, len(PREFIX) :])
        assert len(found) == options.get("num_return_sequences", 1)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_generation_continues_a_conversation_in_its_cache(imported, name):
    model, original, embeddings = prefixed(imported)
    cache = model.make_cache()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    first = model.generate(torch.tensor(TEXTS[:1]), **{name: cache}, **options)
    both = torch.cat((first, torch.tensor([[33, 34, 35]])), dim=1)
    second = model.generate(both, **{name: cache}, **options)
    assert second[0].tolist() == reference_greedy(original, embeddings, both[0].tolist(), 4)


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("continuous", [False, True])
def test_a_chat_equals_the_original_reading_the_prefix(imported, continuous, monkeypatch, capsys):
    """Render two turns with a template that begins with the start token. Only the prefix may have that token."""
    model, original, embeddings = prefixed(imported, continuous=continuous)
    tokenizer = open_model(imported["llama_tied"])[0].tokenizer
    tokenizer.chat_template = TEMPLATE
    answers = iter(["What did it see?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    chat(model, tokenizer, "The house had stood empty.", {"max_new_tokens": 4, "do_sample": False})
    turns, replies = [], []
    for prompt in ("The house had stood empty.", "What did it see?"):
        turns.append({"role": "user", "content": prompt})
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        whole = reference_greedy(original, embeddings, ids[1:], 4)
        replies.append(tokenizer.decode(whole[len(ids) - 1 :], skip_special_tokens=True))
        turns.append({"role": "assistant", "content": replies[-1]})
    shown = capsys.readouterr().out
    assert shown.split() == " ".join(replies).split()


def test_chats_in_one_batch_equal_the_original_one_by_one(imported, caplog):
    model, original, embeddings = prefixed(imported)
    tokenizer = open_model(imported["llama_tied"])[0].tokenizer
    tokenizer.chat_template, tokenizer.pad_token, tokenizer.padding_side = TEMPLATE, tokenizer.eos_token, "left"
    chats = [[{"role": "user", "content": text}] for text in ("The house.", "It had stood empty for years.")]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    texts = [text.removeprefix(tokenizer.bos_token) for text in texts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for row, text in zip(output, texts, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert row[-len(ids) - 4 :].tolist() == reference_greedy(original, embeddings, ids, 4)
    with caplog.at_level(logging.WARNING):
        model.generate(torch.tensor([tokenizer.apply_chat_template(chats[0])["input_ids"]]), max_new_tokens=1)
    assert "begins with the start token" in caplog.text


def test_calls_that_would_lose_the_prefix_are_refused(imported):
    model, original, _ = prefixed(imported)
    token_ids = torch.tensor(TEXTS[:1])
    with pytest.raises(ValueError, match=r"DynamicCache.*holds no prefix.*model.make_cache"):
        model(token_ids, past_key_values=DynamicCache(config=original.config))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
            call(token_ids, past_key_values=model.make_cache(), cache=model.make_cache())
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 9\]. Pass \[batch, 6\]"):
        model(token_ids, attention_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 1, 6, 6\]"):
        model(token_ids, attention_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match=r"attention_mask is a dict. Pass a tensor \[batch, 6\]"):
        model(token_ids, attention_mask={"full_attention": None})
    with pytest.raises(ValueError, match="cache_implementation='static' holds no prefix"):
        model.generate(token_ids, cache_implementation="static")


def test_a_second_start_token_is_warned_of_and_stripped(imported, caplog):
    model, _, _ = prefixed(imported)
    start = model.start_token_id
    assert start == 0
    with caplog.at_level(logging.WARNING):
        model(torch.tensor([[5, start, 6]]))
        assert not caplog.records
        model(torch.tensor([[PAD, 5, 6], [PAD, start, 6]]), attention_mask=torch.tensor([[0, 1, 1], [0, 1, 1]]))
    assert "begins with the start token (id 0)" in caplog.text
    assert strip_start_token([start, 5, start], model) == [5, start]
    assert strip_start_token([5, start], model) == [5, start]
    plain = prefix_model_(make_model("llama_tied"), None, start)
    assert strip_start_token([start, 5], plain) == [start, 5]


@torch.no_grad()
def test_a_plain_checkpoint_is_assembled_to_the_original(imported):
    for family in FAMILIES:
        checkpoint, _ = open_model(imported[family])
        token_ids = torch.tensor(TEXTS[:1])
        model = assemble_model(checkpoint)
        assert torch.equal(model(token_ids).logits, make_model(family)(token_ids).logits)
        assert type(model) is type(make_model(family))


QUANTIZERS = {
    "static": {},
    "asymmetric groups": {
        f"{group}.{key}": value
        for group in ("weights", "activations", "keys", "values")
        for key, value in (("symmetric", False), ("group_size", 2))
    },
    "dynamic": {f"{group}.mode": "dynamic" for group in ("activations", "keys", "values")},
    "keys before RoPE": {"keys.before_rope": True},
}


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("family", ["llama_tied", "llama_untied_biases", "qwen3", *POST_NORMS])
@torch.no_grad()
def test_a_quantized_model_equals_the_walk_in_every_kind_of_call(imported, tmp_path, family, kind):
    """Read a text at once, padded, and token by token. No scale depends on the rest of the batch.

    Where a value lies within float rounding of the middle between two integers, other shapes of a product may round it
    to the other one. That depends on the CPU, so one of three texts may differ.
    """
    r3 = "identity" if kind == "keys before RoPE" else "hadamard"
    checkpoint, runner = make_quantized(imported, tmp_path, family, QUANTIZERS[kind], r3=r3)
    prefix_kv = load_prefix_kv(checkpoint.folder, checkpoint.stage)
    model = assemble_model(checkpoint, prefix_kv)
    deviations = []
    for seed in (10, 11, 12):
        text = torch.randint(0, 320, (1, 12), generator=torch.Generator().manual_seed(seed))
        expected = walked_logits(checkpoint, runner, text, prefix_kv)[0]
        token_ids, mask = pad([text[0].tolist(), [5] * 15], "left")
        cache = model.make_cache()
        steps = [model(text[:, step : step + 1], past_key_values=cache).logits[0, 0] for step in range(12)]
        calls = (model(text).logits[0], model(token_ids, attention_mask=mask).logits[0, 3:], torch.stack(steps))
        largest = max((logits - expected).abs().max() for logits in calls)
        deviations.append(largest.item() / expected.abs().max().item())
    assert sorted(deviations)[1] <= 1e-5, deviations


def test_the_probe_counts_values_of_decoding_beyond_static_ranges(imported, tmp_path):
    checkpoint, _ = make_quantized(imported, tmp_path)
    model = assemble_model(checkpoint, load_prefix_kv(checkpoint.folder, checkpoint.stage))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with probe_saturation(model) as probes:
        model.generate(torch.tensor([[5, 6, 7]]), **options)
    reports = [probe.report() for probe in probes]
    assert len(reports) == 3
    assert all(len(report) == 6 and 0 <= site["share"] < 0.5 for report in reports for site in report.values())
    # Seven tokens (the last one is not read), and all of them are beyond a range of nothing.
    model.model.layers[1].mlp.down_proj.input_quantizer.scale *= 1e-6
    with probe_saturation(model) as probes:
        model.generate(torch.tensor([[5, 6, 7]]), **options)
    assert probes[1].report()["mlp_hidden"]["share"] > 0.99
    assert probes[1]._counts["mlp_hidden"] == 7 * 96


PACKED = [[5, 6, 8, 40, 41, 42], [90, 91, 92, 93], [17], [33, 34, 35]]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_texts_are_read_apart_each_with_the_prefix(imported, family, kernel):
    """Positions that restart and no mask, as a trainer packs texts into one row."""
    model, original, embeddings = prefixed(imported, family)
    if family != "gemma2":
        model.set_attn_implementation(kernel)
    token_ids = torch.tensor([[*chain(*texts)] for texts in (PACKED, PACKED[::-1])])
    position_ids = torch.tensor(
        [[place for text in texts for place in range(len(text))] for texts in (PACKED, PACKED[::-1])]
    )
    output = model(token_ids, position_ids=position_ids, use_cache=False)
    assert output.past_key_values is None
    for row, texts in zip(output.logits, (PACKED, PACKED[::-1]), strict=True):
        expected = torch.cat([reference_logits(original, embeddings, text) for text in texts])
        assert (row - expected).abs().max() <= 1e-4 * expected.abs().max()  # measured: 3e-6
    one_row = model(token_ids[:1], position_ids=position_ids[:1], use_cache=False).logits
    assert torch.allclose(one_row, output.logits[:1], atol=1e-4)


@torch.no_grad()
def test_packed_texts_longer_than_the_window(imported):
    model, original, embeddings = prefixed(imported, "gemma3_text")
    texts = [
        torch.randint(2, 320, (length,), generator=torch.Generator().manual_seed(length)) for length in (40, 70, 3)
    ]
    position_ids = torch.cat([torch.arange(len(text)) for text in texts])[None]
    logits = model(torch.cat(texts)[None], position_ids=position_ids, use_cache=False).logits[0]
    expected = torch.cat([reference_logits(original, embeddings, text.tolist()) for text in texts])
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_empty_inputs_and_positions_of_other_forms_are_refused(imported):
    model, _, _ = prefixed(imported)
    token_ids, positions = torch.tensor([[5, 6, 8, 40]]), torch.arange(4).unsqueeze(0)
    for empty in (token_ids[:, :0], token_ids[:0]):
        with pytest.raises(
            ValueError, match=r"the input has shape \[\d, \d\]: there is nothing to read. Pass at least"
        ):
            model(empty)
    with pytest.raises(ValueError, match=r"position_ids has shape \[4\]. Pass \[batch, 4\] or \[1, 4\]"):
        model(token_ids, position_ids=positions[0])
    mask = torch.tensor([[0, 1, 1, 1]])
    for options in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(mask)}):
        with pytest.raises(ValueError, match="position_ids has -1: negative positions are those of the prefix"):
            model(token_ids, position_ids=positions - 1, **options)
    padded = model(token_ids, position_ids=positions - 1, attention_mask=mask).logits[:, 1:]
    torch.testing.assert_close(padded, model(token_ids[:, 1:]).logits)


def test_other_forms_of_packed_texts_are_refused(imported):
    model, _, _ = prefixed(imported)
    token_ids, restarting = torch.tensor([[5, 6, 8, 40]]), torch.tensor([[0, 1, 0, 1]])
    single = torch.tensor([[0, 0, 0, 0]])  # four texts of one token
    for options in (
        {"position_ids": restarting},
        {"position_ids": restarting, "use_cache": True},
        {"position_ids": single},
        {"position_ids": restarting, "past_key_values": model.make_cache(), "use_cache": False},
        {"position_ids": restarting, "attention_mask": torch.ones(1, 4), "use_cache": False},
    ):
        with pytest.raises(
            ValueError, match=r"position_ids restart within a row.*use_cache=False and no attention_mask"
        ):
            model(token_ids, **options)
    ends = torch.tensor([0, 2, 4], dtype=torch.int32)  # kernels of transformers alone would heed it
    for options in ({}, {"use_cache": False}, {"position_ids": torch.arange(4)[None], "use_cache": False}):
        with pytest.raises(
            ValueError, match=r"cu_seq_lens_q marks several texts.*position_ids that begin at 0 in each"
        ):
            model(token_ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends, **options)
    both = model(token_ids, position_ids=restarting, use_cache=False, cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits
    assert torch.equal(both, model(token_ids, position_ids=restarting, use_cache=False).logits)
    one = {name: torch.tensor([0, 4], dtype=torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    assert torch.equal(model(token_ids, **one).logits, model(token_ids).logits)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no mask that keeps packed texts apart"):
        model(token_ids, position_ids=restarting, use_cache=False)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_position_ids_of_one_text_change_nothing(imported, use_cache):
    model, original, embeddings = prefixed(imported)
    token_ids, mask = pad(TEXTS, "left")
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as older versions of generate have them
    for options in ({"position_ids": position_ids}, {"position_ids": position_ids, "attention_mask": mask.bool()}):
        logits = model(token_ids, **{"attention_mask": mask} | options, use_cache=use_cache).logits
        for row, text in enumerate(TEXTS):
            assert torch.allclose(logits[row, -len(text) :], reference_logits(original, embeddings, text), atol=1e-4)
    text = torch.tensor(TEXTS[:1])
    logits = model(text, position_ids=torch.arange(6)[None], use_cache=use_cache).logits
    assert torch.allclose(logits[0], reference_logits(original, embeddings, TEXTS[0]), atol=1e-4)


POSITIONS = {
    "as usual": [*range(40)],
    "shifted": [*range(4, 44)],
    "a gap": [*range(5), *range(9, 44)],
    "a gap after the first": [0, *range(6, 45)],
    "every second": [*range(0, 80, 2)],
}


@pytest.mark.parametrize("family", ["llama_tied", "mistral", "gemma3_text"])
@torch.no_grad()
def test_positions_that_are_shifted_or_have_gaps_are_those_after_the_prefix(imported, family):
    model, original, embeddings = prefixed(imported, family)
    text = torch.randint(2, 320, (1, 40), generator=torch.Generator().manual_seed(1))
    embedded = torch.cat((embeddings[None], original.model.embed_tokens(text)), dim=1)
    prefix = len(embeddings)
    for name, positions in POSITIONS.items():
        ids, ones = torch.tensor([positions]), torch.ones_like(text)
        whole = torch.cat((torch.arange(prefix)[None], ids + prefix), dim=1)
        mask = torch.ones_like(whole)
        expected = original(inputs_embeds=embedded, position_ids=whole, attention_mask=mask).logits[:, prefix:]
        in_steps, cache = [], model.make_cache()
        for part in (slice(0, 3), slice(3, 7), slice(7, 8), slice(8, 40)):
            in_steps.append(model(text[:, part], position_ids=ids[:, part], past_key_values=cache).logits)
        for logits in (
            model(text, position_ids=ids).logits,
            model(text, position_ids=ids, attention_mask=ones).logits,
            model(text, position_ids=ids, attention_mask=ones, use_cache=False).logits,
            torch.cat(in_steps, dim=1),
        ):
            assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()  # measured: 2e-6
        if name in ("as usual", "shifted"):
            logits = model(text, position_ids=ids, use_cache=False).logits
            assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        else:  # transformers reads a jump as the beginning of another text
            with pytest.raises(ValueError, match=r"position_ids jump from \d to \d in row 0.*attention_mask of ones"):
                model(text, position_ids=ids, use_cache=False)
    restarts_at_one = torch.tensor([[*range(20), *range(1, 21)]])
    with pytest.raises(ValueError, match=r"jump from 19 to 1 in row 0.*begin at 0 in each packed text"):
        model(text, position_ids=restarts_at_one, use_cache=False)


@pytest.mark.parametrize("family", ["llama_tied", "mistral", "gemma3_text"])
@torch.no_grad()
def test_outputs_have_a_cache_only_if_one_is_wanted(imported, family):
    model, _, _ = prefixed(imported, family)
    token_ids = torch.tensor(TEXTS[:1])
    expected = model(token_ids).logits
    alone = model(token_ids, return_dict=False, use_cache=False)
    assert type(alone) is tuple
    assert len(alone) == 1
    assert torch.equal(alone[0], expected)
    output = model(token_ids, use_cache=False)
    assert list(output.keys()) == ["logits"]
    assert output.past_key_values is None
    assert len(output.to_tuple()) == 1
    with_loss = model(token_ids, labels=token_ids, return_dict=False, use_cache=False)
    assert [value.shape for value in with_loss] == [torch.Size([]), expected.shape]
    for options in ({}, {"use_cache": True}):
        logits, cache = model(token_ids, return_dict=False, **options)
        assert torch.equal(logits, expected)
        assert cache.get_seq_length() == len(TEXTS[0])
        assert type(cache) is type(model.make_cache())
    model.config.use_cache = False
    assert model(token_ids).past_key_values is None
    assert len(model(token_ids, return_dict=False)) == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", ["llama_tied", "gemma3_text"])
@torch.no_grad()
def test_torch_export(imported, family, strict):
    """Include a start token in the text, because the warning about it may not branch on data."""
    model, _, _ = prefixed(imported, family)
    token_ids, mask = pad([[5] * 40, [model.start_token_id] + [7] * 30], "left")
    position_ids = torch.tensor([[0, 1, 2, 0, 1]])
    calls = [
        (token_ids, {"use_cache": False}),
        (token_ids, {"use_cache": False, "attention_mask": mask}),
        (token_ids[:1, :5], {"use_cache": False, "position_ids": position_ids}),
    ]
    for ids, options in calls[: 1 if strict else None]:
        expected = model(ids, **options).logits
        program = torch.export.export(model, (ids,), options, strict=strict)
        found = program.module()(ids, **options).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama_tied", "gemma3_text"])
@torch.no_grad()
def test_torch_export_with_a_dynamic_length_and_batch(imported, family):
    """One graph for texts shorter and longer than the sliding window."""
    model, _, _ = prefixed(imported, family)
    token_ids, mask = pad([[5] * 40, [9] * 30], "left")
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    options = {"use_cache": False, "attention_mask": mask}
    program = torch.export.export(model, (token_ids,), options, dynamic_shapes=shapes, strict=False).module()
    for texts in ([[7] * 60, [8] * 50, [6] * 3], [[7, 8, 9], [5]]):
        token_ids, mask = pad(texts, "left")
        expected = model(token_ids, use_cache=False, attention_mask=mask).logits[mask.bool()]
        found = program(token_ids, use_cache=False, attention_mask=mask).logits[mask.bool()]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama_tied", "gemma3_text"])
@torch.no_grad()
def test_attentions_are_those_of_the_original_reading_the_prefix(imported, family):
    model, original, embeddings = prefixed(imported, family)
    token_ids = torch.arange(40, 80)[None]
    embedded = torch.cat((embeddings, original.model.embed_tokens(token_ids[0])))[None]
    for each in (model, original):
        each.set_attn_implementation("eager")
    found = model(token_ids, output_attentions=True, output_hidden_states=True)
    expected = original(inputs_embeds=embedded, output_attentions=True, output_hidden_states=True, use_cache=False)
    assert [len(found.attentions), len(found.hidden_states)] == [3, 4]
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert (ours - theirs[:, :, 3:]).abs().max() <= 1e-5  # measured: 2e-7
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert (ours - theirs[:, 3:]).abs().max() <= 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_the_body_alone_is_refused(imported):
    """It would read a text without the prefix, and without an error."""
    model, _, _ = prefixed(imported)
    for call in (model.model, model.base_model, copy.deepcopy(model).model):
        with pytest.raises(ValueError, match=r"LlamaModel is a part of a model with a prefix.*output_hidden_states"):
            call(torch.tensor(TEXTS[:1]))
    without = prefix_model_(make_model("llama_tied"), None)
    assert without.model(torch.tensor(TEXTS[:1])).last_hidden_state.shape == (1, 6, 48)


@torch.no_grad()
def test_one_mask_for_all_texts(imported):
    model, _, _ = prefixed(imported)
    token_ids, mask = torch.tensor([TEXTS[0], TEXTS[0][::-1]]), torch.tensor([[0, 1, 1, 1, 1, 1]])
    expected = model(token_ids, attention_mask=mask.expand(2, -1)).logits
    assert torch.equal(model(token_ids, attention_mask=mask).logits, expected)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[3, 6\]. Pass \[batch, 6\]"):
        model(token_ids, attention_mask=mask.expand(3, -1))


@torch.no_grad()
def test_compiled_forwards_compute_the_same(imported):
    model, _, _ = prefixed(imported, "gemma3_text")
    token_ids, mask = pad([[5] * 40, [9] * 30], "left")
    expected = model(token_ids, attention_mask=mask).logits
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.allclose(model(token_ids, attention_mask=mask).logits, expected, atol=1e-5)
