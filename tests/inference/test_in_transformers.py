"""An exported model as transformers, torch and PEFT use it, whatever its own classes accept."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import pipeline.hf  # noqa: F401
from pipeline.inference.loading import check_folder, load
from pipeline.inference.manifest import ExportError
from pipeline.inference.packed_block import PackedLinear
from pipeline.inference.transformers_quantizer import GUARD, GUARDS
from pipeline.models.checkpoint import Checkpoint
from tests.conftest import ROOT, read_json
from tests.export.test_folder import TEXT, make_export

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def exported(imported, tmp_path):
    return make_export(imported, tmp_path)


def generate(model, **options):
    return model.generate(TEXT, attention_mask=torch.ones_like(TEXT), **GREEDY | options)


@pytest.mark.parametrize("kind", ["static", "hybrid"])
@torch.no_grad()
def test_a_cache_implementation_that_nobody_passed_is_ignored(exported, kind):
    folder, evaluated, _ = exported
    expected = generate(evaluated)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(read_json(path) | {"cache_implementation": kind}))
    model, _ = load(folder)
    assert model.generation_config.cache_implementation == kind
    assert torch.equal(generate(model), expected)
    assert torch.equal(generate(model, cache_implementation="dynamic"), expected)
    assert torch.equal(generate(model, use_cache=False), expected)
    own = copy.deepcopy(model.generation_config)
    own.update(**GREEDY)
    assert torch.equal(model.generate(TEXT, attention_mask=torch.ones_like(TEXT), generation_config=own), expected)
    own.cache_implementation = "offloaded"
    for options in ({"cache_implementation": "static"}, {"generation_config": own}):
        with pytest.raises(ValueError, match="holds no prefix and quantizes nothing"):
            model.generate(TEXT, **options)


@torch.no_grad()
def test_offloaded_to_disk(exported, tmp_path):
    folder, evaluated, _ = exported
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)
    assert torch.equal(generate(model), generate(evaluated))


@pytest.mark.parametrize("kind", [None, "keys before RoPE"])
@torch.no_grad()
def test_pickled_saved_and_copied(imported, tmp_path, kind):
    folder, evaluated, _ = make_export(imported, tmp_path, "qwen2", kind)
    model, _ = load(folder)
    torch.save(model, tmp_path / "model.pt")
    copies = [pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "model.pt", weights_only=False)]
    copies.append(copy.deepcopy(model))
    for other in copies:
        assert type(other) is type(model)
        assert torch.equal(other(TEXT).logits, evaluated(TEXT).logits)
    assert copies[2].model.layers[0].self_attn.k_proj.fired
    model.model.layers[0].self_attn.value_quantizer.scale.mul_(2)  # a copy has quantizers of its own
    assert torch.equal(copies[2](TEXT).logits, evaluated(TEXT).logits)


@torch.no_grad()
def test_a_worker_process_is_given_the_model(exported):
    folder, evaluated, _ = exported
    model, _ = load(folder)
    pool = torch.multiprocessing.get_context("spawn").Pool(1)
    with pool:
        assert torch.equal(pool.apply(run, (model,)), evaluated(TEXT).logits)


@torch.no_grad()
def run(model):
    return model(TEXT).logits.clone()


@torch.no_grad()
def test_auto_model_gives_hidden_states(exported):
    folder, evaluated, _ = exported
    seen = []
    evaluated.model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    evaluated(TEXT)
    output = AutoModel.from_pretrained(folder)(TEXT)
    assert torch.equal(output.last_hidden_state, seen[0])
    assert torch.equal(evaluated(TEXT, return_dict=False)[0], evaluated(TEXT).logits)


def test_a_head_that_is_not_there_is_not_made_up(exported):
    with pytest.raises(ExportError, match=r"1 tensors are missing: score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(exported[0])


def test_continuous_batching_says_why_not(exported):
    model, _ = load(exported[0])
    with pytest.raises(ValueError, match=r"continuous batching .* hold no prefix and quantize nothing\. Call generate"):
        model.generate_batch([[5, 6, 7]])
    with pytest.raises(ValueError, match="continuous batching"):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match="cache_implementation='paged'"):
        model.generate(TEXT, cache_implementation="paged")


def test_lora_on_top_trains_and_packed_weights_do_not_change(exported):
    folder, evaluated, _ = exported
    model, _ = load(folder)
    assert model.hf_quantizer.is_trainable
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(tuned(TEXT).logits, evaluated(TEXT).logits)  # B begins at zero
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(input_ids=TEXT, labels=TEXT).loss
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 2:  # A's gradients need a B that is not zero
            assert all(p.grad.abs().max() > 0 for p in tuned.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert generate(tuned).shape == (2, 18)


@pytest.mark.parametrize("how", ["enabled", "of the model inside", "by its config"])
def test_gradient_checkpointing_would_take_the_cache_from_blocks(exported, how):
    """And with it the prefix and the quantizers of keys and values: transformers only warns of that."""
    config = AutoConfig.from_pretrained(exported[0])
    config.gradient_checkpointing = how == "by its config"
    model = AutoModelForCausalLM.from_pretrained(exported[0], config=config).train()
    if how == "enabled":
        with pytest.raises(ValueError, match=r"does not support (activation|gradient) checkpointing"):
            model.gradient_checkpointing_enable()
        return
    if how == "of the model inside":
        model.model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="takes the cache away from blocks, and with it the prefix and the quantizers"):
        model(TEXT)
    with torch.no_grad():
        assert torch.equal(model.eval()(TEXT).logits, exported[1](TEXT).logits)


def test_tables_that_are_equal_are_kept_once(imported, tmp_path):
    """Gemma 2's norm is not folded into lm_head: rotation leaves the two as they were, tied."""
    folder, evaluated, _ = make_export(imported, tmp_path, "gemma2")
    assert Checkpoint(imported["gemma2"], "model").config.tie_word_embeddings
    names = set(read_json(folder / "model.safetensors.index.json")["weight_map"])
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    model, _ = load(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again(TEXT).logits, evaluated(TEXT).logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("from_pretrained(folder)", "transformers file in the config seems to be incorrect"),
        (
            "from_pretrained(folder, attn_implementation='sdpa')",
            "transformers file in the config seems to be incorrect",
        ),
        ("from_pretrained(folder, config=AutoConfig.from_pretrained(folder), attn_implementation='eager')", "transf"),
        ("from_pretrained(folder, use_safetensors=False, attn_implementation='eager')", "transformers file in"),
        ("from_config(AutoConfig.from_pretrained(folder))", "is not supported"),
    ],
)
def test_without_the_import_transformers_gives_no_model(exported, call, message):
    program = f"folder = {str(exported[0])!r}; AutoModelForCausalLM.{call}"
    command = [sys.executable, "-c", "from transformers import AutoConfig, AutoModelForCausalLM; " + program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert GUARD in done.stderr


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_with_the_import_an_attention_of_ones_own_is_heeded(exported, attention):
    folder, evaluated, _ = exported
    assert load(folder)[0].config._attn_implementation == "sdpa"
    config = AutoConfig.from_pretrained(folder)
    for options in ({}, {"config": config}):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, **options)
        assert model.config._attn_implementation == attention
        assert "transformers_weights" not in model.config
        off = (model(TEXT).logits - evaluated(TEXT).logits).abs().max() / evaluated(TEXT).logits.abs().max()
        assert off < 1e-4
    assert config.transformers_weights == GUARD  # the caller's stays as it was


@torch.no_grad()
def test_save_pretrained_writes_an_exported_folder(exported, tmp_path):
    folder, evaluated, _ = exported
    model, tokenizer = load(folder)
    tokenizer.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again/config.json").items() >= GUARDS.items()
    assert torch.equal(load(tmp_path / "again")[0](TEXT).logits, evaluated(TEXT).logits)
    (tmp_path / "again/model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ExportError, match=r"model\.safetensors is damaged or was changed"):
        load(tmp_path / "again")


def test_the_models_own_push_to_hub_uploads_an_exported_folder(exported, tmp_path, monkeypatch):
    model, _ = load(exported[0])
    uploaded = tmp_path / "uploaded"
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, name, **options: SimpleNamespace(repo_id=name)
    )
    card = SimpleNamespace(save=lambda path: Path(path).write_text("a card of the hub's"))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **options: card)
    monkeypatch.setattr(
        type(model), "_upload_modified_files", lambda self, folder, *args, **options: shutil.copytree(folder, uploaded)
    )
    model.push_to_hub("me/mine")
    check_folder(uploaded)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(uploaded)(TEXT).logits, exported[1](TEXT).logits)


def test_push_to_hub_sends_the_manifest(exported, tmp_path, monkeypatch):
    model, _ = load(exported[0])
    sent = []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, name, **options: sent.append((name, options)))
    model.save_pretrained(tmp_path / "again", push_to_hub=True, commit_message="New")
    assert (tmp_path / "again/manifest.json").is_file()
    assert sent == [("again", {"token": None, "commit_message": "New"})]


def test_files_of_the_user_may_change(exported):
    folder, _, _ = exported
    (folder / "README.md").write_text("my own words")
    (folder / "generation_config.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"chat_template": "{{ messages }}"}))
    check_folder(folder)
    path.write_text(json.dumps(read_json(path) | {"bos_token": "</s>"}))
    with pytest.raises(ExportError, match=r"tokenizer_config\.json is damaged or was changed"):
        check_folder(folder)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("family", ["llama_tied", "gemma3_text"])
@torch.no_grad()
def test_offloaded_as_accelerate_decides(imported, tmp_path, family, share):
    """The prefix always stays in memory, because caches are made from it outside of any call."""
    folder, evaluated, _ = make_export(imported, tmp_path, family)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    model, _ = load(
        folder,
        device_map="auto",
        max_memory={"cpu": int(share * size)},
        offload_folder=tmp_path / "offload",
        offload_buffers=True,
    )
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)
    assert torch.equal(generate(model), generate(evaluated))


@pytest.mark.parametrize("places", [{"": "disk"}, {"model": "disk", "lm_head": "cpu", "prefix_kv": "disk"}])
@torch.no_grad()
def test_a_map_that_puts_the_prefix_on_the_disk(exported, tmp_path, places):
    folder, evaluated, _ = exported
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload", offload_buffers=True
    )
    assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)
    assert torch.equal(generate(model), generate(evaluated))


@pytest.mark.parametrize("order", ["model, tokenizer", "tokenizer, model", "model", "twice"])
@torch.no_grad()
def test_saved_into_its_own_folder(exported, order):
    folder, evaluated, _ = exported
    for _ in range(2 if order == "twice" else 1):
        model, tokenizer = load(folder)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer(["a text", "another, longer text"], padding=True, truncation=True, max_length=8)  # is saved with it
        saves = {"model": model.save_pretrained, "tokenizer": tokenizer.save_pretrained}
        for name in (order if order != "twice" else "model, tokenizer").split(", "):
            saves[name](folder)
        assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)  # what was mapped is not written over
    again, other = load(folder)
    assert torch.equal(again(TEXT).logits, evaluated(TEXT).logits)
    assert other("The house")["input_ids"] == tokenizer("The house")["input_ids"]


def test_a_tokenizer_saved_alone_names_the_remedy(exported):
    folder, _, _ = exported
    model, tokenizer = load(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ExportError, match=r"tokenizer.*\.json is damaged or was changed.*save the model here too"):
        load(folder)
    model.save_pretrained(folder)
    assert "<new>" in load(folder)[1].get_vocab()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 2}, r"num_hidden_layers=2: the folder holds 3 blocks.*Leave num_hidden_layers out"),
        ({"num_hidden_layers": 4}, r"num_hidden_layers=4: the folder holds 3 blocks"),
        ({"hidden_size": 24}, r"has shape .* in the folder and .* by its config.*such as hidden_size"),
        (
            {"rms_norm_eps": 0.1},
            r"rms_norm_eps=0\.1: the folder was exported with rms_norm_eps=1e-0\d.*Leave rms_norm_eps out",
        ),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu': the folder was exported with hidden_act='silu'"),
        ({"num_key_value_heads": 1}, r"has shape .* in the folder and .* by its config"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            r"rope_parameters=.*500000.*was exported with .*10000.*Leave rope_parameters out",
        ),
        ({"vocab_size": 400, "ignore_mismatched_sizes": True}, r"has shape \[320, 48\] in the folder and \[400, 48\]"),
    ],
)
def test_other_depths_sizes_and_functions_are_refused(exported, options, message):
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ExportError, match=message):
            loader(exported[0], **options)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma3_text", {"sliding_window": 5}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"tie_word_embeddings": False}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_another_attention_is_refused(imported, tmp_path, family, options):
    folder, _, _ = make_export(imported, tmp_path, family)
    (key,) = options
    with pytest.raises(ExportError, match=rf"\b{key}=.*: the folder was exported with .*Leave .*\b{key} out"):
        load(folder, **options)


@torch.no_grad()
def test_keys_that_leave_the_function_alone_are_free(exported):
    folder, evaluated, _ = exported
    options = {"max_position_embeddings": 4096, "attention_dropout": 0.5, "bos_token_id": 5, "use_cache": False}
    assert torch.equal(load(folder, **options)[0](TEXT).logits, evaluated(TEXT).logits)
    assert load(folder, dtype="auto")[0].dtype == torch.float32


def test_dequantize_says_why_not(exported):
    folder, evaluated, _ = exported
    loaded, body = load(folder)[0], AutoModel.from_pretrained(folder)
    calls = [
        loaded.dequantize,
        evaluated.dequantize,
        body.dequantize,
        lambda: loaded.dequantize(torch.bfloat16),
        lambda: loaded.hf_quantizer.dequantize(loaded),
        lambda: loaded.hf_quantizer.dequantize(loaded, dtype=torch.float32),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"dequantize\(\) has no unquantized model.*Load the original"):
            call()
    with torch.no_grad():
        assert torch.equal(loaded(TEXT).logits, evaluated(TEXT).logits)
        assert loaded.is_quantized


def test_weights_are_kept_unpacked_where_memory_allows(exported, monkeypatch):
    """The results are the same either way. Unpacked weights take the memory of a plain model."""
    folder, evaluated, _ = exported
    for unpacked, free, keeps in (
        (True, 0, True),
        (False, 2**40, False),
        (None, 2**40, True),
        (None, 1000, False),
        (None, 0, False),
    ):
        monkeypatch.setattr("pipeline.inference.packed_block.measure_free", lambda device, free=free: free)
        model, _ = load(folder, unpacked=unpacked)
        with torch.no_grad():
            assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)
        linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
        kept = {linear._dequantized is not None for linear in linears}
        assert kept == {keeps}
        with torch.no_grad():
            assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)
    model.keep_unpacked_(True)
    model(TEXT)
    assert all(linear._dequantized.weight.shape == (linear.out_features, linear.in_features) for linear in linears)
    model.keep_unpacked_(False)
    assert all(linear._dequantized is None for linear in linears)


def test_the_choice_is_made_again_where_the_model_goes(exported, monkeypatch):
    monkeypatch.setattr("pipeline.inference.packed_block.measure_free", lambda device: 2**40)
    model, _ = load(exported[0])
    linear = model.model.layers[0].mlp.up_proj
    model(TEXT)
    assert linear._dequantized is not None
    monkeypatch.setattr("pipeline.inference.packed_block.measure_free", lambda device: 0)
    model.to(torch.bfloat16)
    assert linear._dequantized is None
    assert not linear.keeps_unpacked
    model.keep_unpacked_(True)
    model.to(torch.float32)
    assert linear.keeps_unpacked  # asked for


def test_an_unpacked_weight_follows_its_sources(exported):
    """Changed in place, replaced, loaded or cast, as a caller may do to any tensor of a model."""
    model, _ = load(exported[0], unpacked=True)
    linear = model.model.layers[0].mlp.up_proj
    first = linear.dense_weight(torch.float32)
    assert linear.dense_weight(torch.float32) is first
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    linear.weight_scale.mul_(2)
    assert torch.equal(linear.dense_weight(torch.float32), 2 * first)
    linear.load_state_dict(state)
    assert torch.equal(linear.dense_weight(torch.float32), first)
    linear.weight_packed = torch.zeros_like(linear.weight_packed)
    assert not torch.equal(linear.dense_weight(torch.float32), first)
    assert linear.dense_weight(torch.bfloat16).dtype == torch.bfloat16


def test_a_weight_unpacked_in_inference_mode_serves_a_backward_pass(exported):
    model, _ = load(exported[0], unpacked=True)
    with torch.inference_mode():
        model(TEXT)
    embedded = model.get_input_embeddings()(TEXT).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    assert embedded.grad.abs().max() > 0


def test_copies_and_pickles_leave_unpacked_weights_out(exported):
    model, _ = load(exported[0], unpacked=True)
    size = len(pickle.dumps(model))
    model(TEXT)
    assert len(pickle.dumps(model)) < 1.05 * size
    assert copy.deepcopy(model).model.layers[0].mlp.up_proj._dequantized is None


def test_offloaded_weights_are_not_kept(exported, tmp_path):
    folder, _, _ = exported
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    options = {"max_memory": {"cpu": size // 2}, "offload_folder": tmp_path / "offload", "offload_buffers": True}
    model, _ = load(folder, device_map="auto", **options)
    model(TEXT)
    assert not any(linear.keeps_unpacked for linear in model.modules() if isinstance(linear, PackedLinear))
