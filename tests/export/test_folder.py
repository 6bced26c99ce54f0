"""The exported folder: the loaded model is the evaluated one, and damaged folders are refused."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import pipeline.hf
from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.blocks.quantized import find_site_quantizers
from pipeline.evaluation.perplexity import evaluate_model
from pipeline.export.folder import export_model, parse_size, write_shards
from pipeline.inference.loading import check_folder, load, use_integers_
from pipeline.inference.manifest import fingerprint_files, read_manifest
from pipeline.inference.packed_block import PackedLinear
from pipeline.inference.prefixed_model import assemble_model
from pipeline.inference.transformers_quantizer import ExportError
from pipeline.kernels.compiler import find_kernels
from pipeline.models.architectures import find_architecture
from pipeline.runtime.artifacts import load_tensors, make_header, save_tensors
from pipeline.text.start_token import find_added_token, set_start_token_
from pipeline.text.windows import prepend_start_token
from tests.conftest import PROSE_FILE, ROOT, make_tokenizer, open_model
from tests.inference.test_prefixed_model import PREFIX, QUANTIZERS, make_quantized

NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="looks into /proc")
FAMILIES = ["llama_tied", "llama_untied_biases", "mistral", "qwen2", "qwen3", "gemma2", "olmo2"]
RESULTS = {"original": {"perplexity": {"prose": 2.5}, "settings": {"windows": {"prose": 2}, "targets_per_window": 47}}}
TEXT = torch.randint(2, 320, (2, 14), generator=torch.Generator().manual_seed(3))


def make_export(imported, folder, family="llama_tied", kind=None, max_shard_size="5GB", **options):
    """Return an exported folder, the model that it was made of, assembled in memory, and the metrics."""
    r3 = "identity" if kind == "keys before RoPE" else "hadamard"
    changes = QUANTIZERS[kind] if kind else options.pop("changes", None)
    checkpoint, _ = make_quantized(imported, folder, family, changes, r3=r3, **options)
    prefix, _ = load_tensors(checkpoint.folder / "prefix.safetensors", checkpoint.stage)
    header = make_header("export", {})
    metrics = export_model(
        checkpoint,
        prefix,
        folder / "export",
        original=imported[family],
        max_shard_size=max_shard_size,
        header=header,
        results=RESULTS,
    )
    kv = load_prefix_kv(checkpoint.folder, checkpoint.stage)
    return folder / "export", assemble_model(checkpoint, kv, "cpu", options.get("start_token")), metrics


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_loaded_model_is_the_evaluated_model(imported, tmp_path, family, kind):
    folder, evaluated, _ = make_export(imported, tmp_path, family, kind)
    model, tokenizer = load(folder)
    assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)
    mask = torch.ones_like(TEXT)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(TEXT, **options), evaluated.generate(TEXT, **options))
    assert tokenizer("The house")["input_ids"] == open_model(imported[family])[0].tokenizer("The house")["input_ids"]


@NEEDS_PROC
def test_unwritten_shards_keep_no_file_mapped(imported, tmp_path, monkeypatch):
    """A view of one small tensor would keep the whole file of its block mapped."""
    collected = collect_parts(monkeypatch, "pipeline.export.folder")
    make_export(imported, tmp_path)
    check_parts(collected)


def collect_parts(monkeypatch, module):
    """Return the list that collects the parts that `module` writes."""
    collected = []

    def write(parts, *args):
        collected.extend(parts)
        return write_shards(collected, *args)

    monkeypatch.setattr(f"{module}.write_shards", write)
    return collected


def check_parts(parts):
    """Assert that no tensor of a block lies in a mapped file."""
    blocks = parts[1:]
    assert len(blocks) == 3
    files = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            files.append(range(*(int(end, 16) for end in line.split()[0].split("-"))))
    assert not any(tensor.data_ptr() in file for part in blocks for tensor in part.values() for file in files)


@torch.no_grad()
def test_transformers_alone_loads_saves_and_loads_again(imported, tmp_path):
    folder, evaluated, _ = make_export(imported, tmp_path, "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = evaluated(TEXT).logits
    assert torch.equal(model(TEXT).logits, expected)
    assert model.config.quantization_config.quant_method == "prefixquant"
    assert model.is_quantized
    for integers in (False, True):
        if integers:
            use_integers_(model)
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again(TEXT).logits, expected)
    mapped = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    assert torch.equal(mapped(TEXT).logits, expected)
    # In bfloat16, scales and prefix stay as they were computed.
    narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert narrow.prefix_kv.dtype == torch.float32
    linear = narrow.model.layers[0].mlp.down_proj
    assert linear.weight_scale.dtype == torch.float32
    assert torch.equal(linear.weight_scale, model.model.layers[0].mlp.down_proj.weight_scale)
    assert narrow.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(narrow(TEXT).logits).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weights.symmetric": False, "activations.symmetric": False},
        {"weights.bits": 3, "activations.bits": 8},
        {"activations.centered": False},
    ],
)
@torch.no_grad()
def test_integer_arithmetic_computes_the_same_function(imported, tmp_path, changes):
    folder, _, _ = make_export(imported, tmp_path, "llama_untied_biases", changes=changes)
    model, _ = load(folder)
    exact, _ = load(folder)
    for block in exact.model.layers:
        x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1))
        for name, width in (("self_attn.q_proj", 48), ("mlp.down_proj", 96)):
            assert isinstance(block.get_submodule(name), PackedLinear)
            assert block.get_submodule(name).in_features == width
    use_integers_(model)
    for block, other in zip(model.model.layers, exact.model.layers, strict=True):
        for norm, readers in model_sites(block):
            a, b = block.get_submodule(norm)(x), other.get_submodule(norm)(x)
            assert a.dtype == torch.uint8
            for name in readers:
                output, expected = block.get_submodule(name)(a), other.get_submodule(name)(b)
                assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()  # measured: 5e-7
        hidden = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(2))
        output, expected = block.mlp.down_proj(hidden), other.mlp.down_proj(hidden)
        assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert block.mlp.down_proj.product is not None
    assert torch.isfinite(model(TEXT).logits).all()


@pytest.mark.parametrize("r4", ["hadamard", "block_hadamard", "identity"])
@torch.no_grad()
def test_codes_of_one_pass_match_a_hooked_quantizer(imported, tmp_path, r4):
    """A hook on a quantizer receives its rotated input, and changes nothing."""
    online = {"r1": "online", "r5": "hadamard", "r4": r4, "block_size": 16, "online_signs": True}
    folder, _, _ = make_export(imported, tmp_path, "llama_untied_biases", **online)
    model, _ = load(folder, arithmetic="integer")
    expected, called_sites = model(TEXT).logits, []
    architecture = find_architecture(model.config)
    for block in model.model.layers:
        quantizers = find_site_quantizers(block, architecture)
        assert [site for site, quantizer in quantizers.items() if quantizer.one_pass is None] == (
            ["key", "value"] if find_kernels() else list(quantizers)
        )
        assert all(quantizer.fired for quantizer in quantizers.values())
        for site, quantizer in quantizers.items():
            quantizer.register_forward_hook(lambda module, args, output, site=site: called_sites.append(site))
    watched = model(TEXT).logits
    assert len(called_sites) == 6 * len(model.model.layers)
    inputs, (block, *_) = [], model.model.layers
    quantizer = find_site_quantizers(block, architecture)["mlp_hidden"]
    quantizer._forward_hooks.clear()
    quantizer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    assert torch.equal(model(TEXT).logits, watched)
    assert len(inputs) == 1
    assert (watched - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@torch.no_grad()
def test_integers_are_multiplied_in_dtypes_without_kernels(imported, tmp_path, dtype):
    """Many tokens and few, loaded in the dtype or cast to it later."""
    folder, _, _ = make_export(imported, tmp_path, "llama_untied_biases", r1="online", r5="hadamard")
    exact, _ = load(folder)
    model, _ = load(folder, arithmetic="integer", **({"dtype": dtype} if dtype == torch.float16 else {}))
    model = model.to(dtype)
    for block, other in zip(model.model.layers, exact.model.layers, strict=True):
        for tokens in (2, 40):
            hidden = torch.randn(1, tokens, 96, generator=torch.Generator().manual_seed(2))
            output, expected = block.mlp.down_proj(hidden.to(dtype)), other.mlp.down_proj(hidden)
            error = (output.double() - expected).square().mean() / expected.double().square().mean()
            assert error <= 1e-3  # some values in float16 round to the next integer
    assert torch.isfinite(model(TEXT).logits).all()
    assert torch.isfinite(model(TEXT[:1, :2]).logits).all()


def model_sites(block):
    return (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    )


@torch.no_grad()
def test_settings_that_integers_cannot_express_stay_in_floats(imported, tmp_path):
    for kind in ("dynamic", "asymmetric groups"):
        folder, evaluated, _ = make_export(imported, tmp_path / kind, kind=kind)
        model, _ = load(folder, arithmetic="integer")
        assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)


@torch.no_grad()
def test_unquantized_weights_and_no_prefix(imported, tmp_path):
    folder, evaluated, metrics = make_export(imported, tmp_path, changes={"weights.bits": 16}, prefix=[])
    model, _ = load(folder)
    assert model.prefix_kv is None
    assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)
    assert metrics["size_ratio"] > 0.5


@pytest.mark.parametrize("prefix", [[], [7, 9]])
@pytest.mark.parametrize("habit", [None, 0])
@torch.no_grad()
def test_folder_records_that_texts_begin_with_a_start_token(imported, tmp_path, habit, prefix):
    """Where the prefix does not end in it, the tokenizer adds it to texts, and windows begin with it."""
    source = {"gemma2": tmp_path / "source"}
    shutil.copytree(imported["gemma2"], source["gemma2"])
    tokenizer = AutoTokenizer.from_pretrained(source["gemma2"])
    if set_start_token_(tokenizer, habit):
        tokenizer.save_pretrained(source["gemma2"])
    folder, evaluated, _ = make_export(source, tmp_path, "gemma2", prefix=prefix, start_token=0, r1="identity")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["text_start_token_id"] == 0
    assert config["prefix"] == {"tokens": len(prefix), "token_ids": prefix, "start_token_id": None}
    model, tokenizer = load(folder)
    plain = make_tokenizer()("The house")["input_ids"]
    assert tokenizer("The house")["input_ids"] == [0, *plain]
    assert (model.text_start_token_id, model.start_token_id) == (0, None)
    assert "begins with the start token `<s>`" in (folder / "README.md").read_text()
    windows = torch.randint(2, 320, (3, 20), generator=torch.Generator().manual_seed(8))
    metrics, tensors, _ = evaluate_model(model, {"a": windows}, 2, None)
    ids = prepend_start_token(windows, 0)
    labels = ids.clone()
    labels[:, :2] = -100
    assert metrics["perplexity"]["a"] == pytest.approx(evaluated(ids, labels=labels).loss.exp().item(), rel=1e-5)
    assert tensors["hidden.a"].shape == (3, 20, 48)
    assert metrics["settings"]["special_tokens"] == "start token (id 0) before each window"
    # The folder that transformers saves records it too.
    model.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").text_start_token_id == 0


@pytest.mark.parametrize("prefix", [PREFIX, []])
def test_tokenizer_adds_no_start_token_that_windows_did_not_have(imported, tmp_path, prefix):
    source = {"llama_tied": tmp_path / "source"}
    shutil.copytree(imported["llama_tied"], source["llama_tied"])
    tokenizer = AutoTokenizer.from_pretrained(source["llama_tied"])
    set_start_token_(tokenizer, 0)
    tokenizer.save_pretrained(source["llama_tied"])
    folder, _, _ = make_export(source, tmp_path, prefix=prefix)
    assert "text_start_token_id" not in json.loads((folder / "config.json").read_text())["quantization_config"]
    model, tokenizer = load(folder)
    assert model.text_start_token_id is None
    assert find_added_token(tokenizer) is None


def test_sizes_shards_and_contents_of_the_folder(imported, tmp_path):
    folder, evaluated, metrics = make_export(imported, tmp_path, max_shard_size="10KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata().keys() == {"prefixquant"}
    assert metrics["original_mib"] > metrics["size_mib"]
    model, _ = load(folder)
    assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".md", ".jinja"}
    config = json.loads((folder / "config.json").read_text())
    assert "prefixquant" not in config
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "prefixquant"
    assert quantization["blocks"]["block"]["online_r4"] is True
    assert quantization["blocks"]["block"]["online_r5"] is True
    assert quantization["blocks"]["block"]["sites"]["key"]["bits"] == 4
    assert quantization["prefix"] == {"tokens": 3, "token_ids": [7, 9, 0], "start_token_id": 0}
    card = (folder / "README.md").read_text()
    assert "W4A4KV4 static" in card
    assert "import prefixquant" in card
    assert "| prose, perplexity | 2.50 |" in card


def test_exports_are_byte_identical(imported, tmp_path):
    one, _, _ = make_export(imported, tmp_path / "one")
    two, _, _ = make_export(imported, tmp_path / "two")
    assert [path.name for path in sorted(one.iterdir())] == [path.name for path in sorted(two.iterdir())]
    assert all(path.read_bytes() == (two / path.name).read_bytes() for path in one.iterdir())


@pytest.mark.parametrize("start_token", [None, 0])
def test_chat_templates_in_their_folder_reach_the_export(imported, tmp_path, start_token):
    source = shutil.copytree(imported["llama_tied"], tmp_path / "imported")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    folder, _, _ = make_export({"llama_tied": source}, tmp_path, prefix=(7, 9, 4), start_token=start_token)
    _, loaded = load(folder)
    assert loaded.chat_template == tokenizer.chat_template
    assert find_added_token(loaded) == start_token
    name = "additional_chat_templates/tool_use.jinja"
    assert read_manifest(folder)[name]["bytes"] == (folder / name).stat().st_size
    (folder / name).write_text("{{ tools | length }}")  # templates belong to the user
    check_folder(folder)


def test_sizes_are_parsed():
    assert [parse_size(text) for text in ("5GB", "200MB", "64KB")] == [5 * 10**9, 2 * 10**8, 64_000]
    with pytest.raises(ValueError, match=r"export\.max_shard_size='5 GB': expected a whole number with KB, MB or GB"):
        parse_size("5 GB")


@pytest.mark.parametrize("template", [True, False])
def test_a_tokenizer_stops_adding_the_start_token(imported, template):
    tokenizer = AutoTokenizer.from_pretrained(imported["llama_tied"])
    assert not set_start_token_(tokenizer, None)
    plain = tokenizer("The house")["input_ids"]
    if template:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    else:
        tokenizer.add_bos_token = True
    assert tokenizer("The house")["input_ids"] == [0, *plain]
    assert set_start_token_(tokenizer, None)
    assert tokenizer("The house")["input_ids"] == plain


# --- Damaged folders -------------------------------------------------------------------------------------------------


def damage(folder, generator):
    """Damage a random file, and return the kind of damage and the file's name."""
    path = generator.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    kind = generator.choice(["flip", "truncate", "append", "remove", "empty", "header"])
    if kind == "flip":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif kind == "truncate":
        del data[generator.randrange(len(data)) :]
    elif kind == "append":
        data += bytes(generator.randrange(256) for _ in range(generator.randrange(1, 20)))
    elif kind == "empty":
        data.clear()
    elif kind == "header":
        data[: min(8, len(data))] = bytes(generator.randrange(256) for _ in range(min(8, len(data))))
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{kind} {path.name}"


def test_three_hundred_damaged_folders_are_refused_with_a_message(imported, tmp_path):
    folder, _, _ = make_export(imported, tmp_path, max_shard_size="20KB")
    check_folder(folder)
    generator = random.Random(0)
    for _ in range(300):
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        change = damage(broken, generator)
        if change.endswith(FREE) or (same_manifest(folder, broken) and change.endswith("manifest.json")):
            check_folder(broken)  # white space in the manifest has no meaning
        else:
            with pytest.raises(ExportError, match=str(broken)):
                load(broken)
        shutil.rmtree(broken)


FREE = ("README.md", "generation_config.json")


def same_manifest(one, two):
    try:
        return json.loads((one / "manifest.json").read_text()) == json.loads((two / "manifest.json").read_text())
    except (OSError, ValueError):
        return False


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def set_entry(manifest, name, entry):
    manifest["files"][name] = entry
    manifest["fingerprint"] = fingerprint_files(manifest["files"])


def test_foreign_and_newer_folders_are_refused(imported, tmp_path):
    folder, _, _ = make_export(imported, tmp_path)
    with pytest.raises(ExportError, match="there is no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"manifest.json is missing\. Give a folder that this project exported"):
        load(imported["llama_tied"])
    for entry in (1, {}, {"bytes": "x"}):
        edit_json(folder / "manifest.json", lambda values: set_entry(values, "config.json", entry))  # noqa: B023
        with pytest.raises(ExportError, match=r"config\.json is damaged or was changed"):
            load(folder)
    edit_json(folder / "manifest.json", lambda values: values.update(format_version=3))
    with pytest.raises(ExportError, match=r"format_version=3: this version of the project reads 2\. Update it"):
        load(folder)
    edit_json(folder / "config.json", lambda values: values["quantization_config"].update(format_version=3))
    with pytest.raises(ExportError, match="format_version=3"):
        AutoModelForCausalLM.from_pretrained(folder)
    edit_json(folder / "config.json", lambda values: values["quantization_config"].update(format_version=2, surprise=1))
    with pytest.raises(ExportError, match="unknown keys: surprise"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_transformers_gives_no_partial_model(imported, tmp_path):
    """Missing tensors are an error, although transformers alone only warns."""
    folder, _, _ = make_export(imported, tmp_path)
    (path,) = folder.glob("*.safetensors")
    tensors, header = load_tensors(path, "export")
    for missing in (
        "model.layers.1.mlp.up_proj.weight_scale",
        "model.layers.2.self_attn.key_quantizer.quantizer.scale",
    ):
        save_tensors(path, {name: tensor for name, tensor in tensors.items() if name != missing}, header)
        with pytest.raises(ExportError, match=f"1 tensors are missing: {missing}"):
            AutoModelForCausalLM.from_pretrained(folder)


# --- Commands --------------------------------------------------------------------------------------------------------


def run(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=None)


def test_commands_generate_and_evaluate(imported, tmp_path):
    folder, evaluated, _ = make_export(imported, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("The house had")["input_ids"]])
    expected = tokenizer.decode(evaluated.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :])
    done = run("pipeline.generate", folder, "The house had", "--max-new-tokens", 6, "--arithmetic", "float")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == expected.strip()
    results = tmp_path / "results.json"
    text = PROSE_FILE
    done = run("pipeline.evaluate", folder, "--text", text, "--length", 48, "--windows", 2, "--json", results)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads(results.read_text())
    assert metrics["settings"]["windows"] == {"prose.txt": 2}
    assert 1 < metrics["perplexity"]["prose.txt"] < 10_000
    for arguments in (("pipeline.generate", tmp_path, "x"), ("pipeline.evaluate", folder)):
        failed = run(*arguments)
        assert failed.returncode == 1
        assert failed.stderr.strip().splitlines()[-1].startswith("error: ")


assert pipeline.hf
