import functools
import json
import math
import shutil

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import ApertusConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaForCausalLM

from pipeline.importing import import_model as model_import
from pipeline.importing.import_model import ModelImportError, import_model
from pipeline.inspection.import_gate import check_import
from pipeline.models.architectures import ARCHITECTURES, Architecture, UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.runtime.artifacts import read_header
from tests.conftest import FAMILIES, SIZES, WINDOW, make_model, make_tokenizer, randomize_


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_same_model_from_the_import(family, imported, token_ids):
    loaded = AutoModelForCausalLM.from_pretrained(imported[family]).eval()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, make_model(family)(token_ids).logits)
    assert AutoTokenizer.from_pretrained(imported[family])("a stone bridge").input_ids


def test_fused_projections_are_split_and_long_positions_kept(model_folders, tmp_path, token_ids):
    folder = shutil.copytree(model_folders["phi3"], tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0] * 6}
    config["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0} | factors
    config |= {"original_max_position_embeddings": 16, "max_position_embeddings": 256, "sliding_window": 64}
    (folder / "config.json").write_text(json.dumps(config))
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["MistralForCausalLM"]
    assert "self_attn.k_proj.weight" in Checkpoint(tmp_path / "out", "model").load_block_tensors(2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        for ids in (token_ids, token_ids[:, :10]):  # beyond and within the original positions
            assert torch.equal(loaded(ids).logits, original(ids).logits)
    assert loaded.config.sliding_window == 64


def test_buffers_that_are_state_are_imported(tmp_path, monkeypatch):
    """Apertus keeps two numbers of its activation in buffers. No family with buffers is supported yet."""
    norms = {"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"}
    monkeypatch.setitem(ARCHITECTURES, "apertus", Architecture(mlp_readers=("mlp.up_proj",), heads_first=True, **norms))
    torch.manual_seed(0)
    model = randomize_(
        AutoModelForCausalLM.from_config(
            ApertusConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        )
    )
    model.model.layers[1].mlp.act_fn.beta.fill_(0.25)
    model.save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    gate = functools.partial(check_import, limit=8 << 30)
    import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "out", check_result=gate)
    block = Checkpoint(tmp_path / "out", "model").load_block_tensors(1)
    assert block["mlp.act_fn.beta"].item() == 0.25


def test_imports_are_byte_identical_without_paths_and_versions(model_folders, imported, tmp_path):
    import_model(str(model_folders["llama_tied"]), None, torch.float32, tmp_path / "again")
    first = {path.name: path.read_bytes() for path in imported["llama_tied"].iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    config = json.loads(first["config.json"])
    assert not {"_name_or_path", "transformers_version"} & set(config)


def test_other_weights_have_another_fingerprint(model_folders, imported, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert read_header(tmp_path / "out", "model") != read_header(imported["llama_tied"], "model")


def test_dtype_is_cast_once(model_folders, tmp_path):
    import_model(str(model_folders["llama_tied"]), None, torch.bfloat16, tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out", "model")
    assert checkpoint.dtype == torch.bfloat16
    source = load_file(model_folders["llama_tied"] / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(checkpoint.load_block_tensors(1)["mlp.up_proj.weight"], source[name].bfloat16())


def broken(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
        (lambda t: t.update(surplus=torch.zeros(1)), r"1 unexpected \(surplus\)"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), r"model\.norm\.weight holds NaN or infinite"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"shape \[3\], its config asks for \[48\]"),
    ],
)
def test_wrong_tensors_are_refused_and_leave_nothing(change, message, model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    broken(folder, change)
    with pytest.raises(ModelImportError, match=message):
        import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_tied_checkpoint_may_hold_lm_head_and_rotary_table(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    broken(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()} | extra))
    assert import_model(str(folder), None, torch.float32, tmp_path / "out")["tied_embeddings"] is True


def test_damaged_missing_pickled_and_foreign_sources_are_refused(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelImportError, match=r"model\.safetensors is damaged"):
        import_model(str(folder), None, torch.float32, tmp_path / "out")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelImportError, match=r"only pytorch_model\.bin, and pickles are never read"):
        import_model(str(folder), None, torch.float32, tmp_path / "out")
    (folder / "config.json").unlink()
    with pytest.raises(ModelImportError, match=r"no config\.json"):
        import_model(str(folder), None, torch.float32, tmp_path / "out")
    for source in ("./nowhere", str(tmp_path / "nothing"), str(tmp_path / "nothing.gguf")):
        with pytest.raises(ModelImportError, match="there is no such"):
            import_model(source, None, torch.float32, tmp_path / "out")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ModelImportError, match=r"text\.gguf does not begin as a GGUF file does"):
        import_model(str(tmp_path / "text.gguf"), None, torch.float32, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsupported_families_are_refused_with_a_list(tmp_path):
    GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UnsupportedModelError,
        match=r"'gpt2' is not supported\. Supported are: apertus, arcee, cwm, ernie4_5, ernie4_5_moe, exaone4, gemma,",
    ):
        import_model(str(tmp_path), None, torch.float32, tmp_path / "out")


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized .*'gptq'"),
        ({"prefixquant": {}}, "written by this project"),
    ],
)
def test_already_quantized_sources_are_refused(addition, message, model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | addition))
    with pytest.raises(ModelImportError, match=message):
        import_model(str(folder), None, torch.float32, tmp_path / "out")


def test_hub_downloads_name_the_revision_and_skip_pickles(model_folders, tmp_path, monkeypatch):
    asked = {}

    def snapshot(repository, **options):
        asked.update(options, repository=repository)
        return str(model_folders["llama_tied"])

    monkeypatch.setattr(model_import, "snapshot_download", snapshot)
    import_model("someone/some-model", "v1.0", torch.float32, tmp_path / "out")
    assert (asked["repository"], asked["revision"]) == ("someone/some-model", "v1.0")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])
    assert "consolidated*" in asked["ignore_patterns"]


def test_the_readme_of_a_folder_is_kept_for_the_model_card(model_folders, imported, tmp_path):
    source = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    import_model(str(source), None, torch.float32, tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == "---\nlicense: mit\n---\n"
    assert not (imported["llama_tied"] / "README.md").exists()
    assert read_header(tmp_path / "model", "model") == read_header(imported["llama_tied"], "model")


def test_only_shards_of_the_index_are_read(model_folders, imported, tmp_path):
    """A second copy of the weights in another layout is ignored, and a missing shard is named."""
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    make_model("llama_tied").save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    save_file({"layers.0.attention.wq.weight": torch.zeros(1)}, folder / "consolidated.safetensors")
    import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert read_header(tmp_path / "out", "model") == read_header(imported["llama_tied"], "model")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ModelImportError, match=r"names files that are missing: model-00002-of-"):
        import_model(str(folder), None, torch.float32, tmp_path / "out")


def test_unreachable_hub_names_the_request_in_one_line(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise LocalEntryNotFoundError("cannot find the requested files\nand more")

    monkeypatch.setattr(model_import, "snapshot_download", fail)
    with pytest.raises(
        ModelImportError,
        match=r"'a/b', revision='main': no such file or folder, and it cannot be fetched.*requested files\)\. Correct",
    ) as error:
        import_model("a/b", "main", torch.float32, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_plan_is_checked_before_any_tensor_is_read(model_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(model_import, "_check_tensor", lambda *args: pytest.fail("a tensor was read"))

    def refuse(widths, blocks, max_positions, sliding_window):
        assert (blocks, max_positions, sliding_window) == (3, 256, WINDOW)
        assert widths["down_proj"] == widths["mlp_hidden"] == 96
        assert len(widths) == 13
        raise KeyError("refused")

    with pytest.raises(KeyError, match="refused"):
        import_model(str(model_folders["qwen2"]), None, torch.float32, tmp_path / "out", check_plan=refuse)


def test_tied_flag_with_another_lm_head_is_imported_untied(model_folders, tmp_path, token_ids):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    broken(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 1.5 + 0.1}))
    assert import_model(str(folder), None, torch.float32, tmp_path / "out")["tied_embeddings"] is False
    source_model, loaded = (AutoModelForCausalLM.from_pretrained(where).eval() for where in (folder, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, source_model(token_ids).logits)
        assert (loaded(token_ids).logits - make_model("llama_tied")(token_ids).logits).abs().max() > 1
    assert Checkpoint(tmp_path / "out", "model").config.tie_word_embeddings is False


def test_tied_checkpoint_may_hold_only_its_lm_head(model_folders, imported, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    broken(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert read_header(tmp_path / "out", "model") == read_header(imported["llama_tied"], "model")


@pytest.mark.parametrize("gone", [False, True])
def test_model_safetensors_is_read_whatever_the_index_says(gone, model_folders, imported, tmp_path):
    """Read the same files as transformers."""
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    make_model("llama_tied", seed=1).save_pretrained(tmp_path / "other", max_shard_size="40KB")
    for path in (tmp_path / "other").glob("model*"):
        shutil.copyfile(path, folder / path.name)
    for path in folder.glob("model-*") if gone else ():
        path.unlink()
    assert (folder / "model.safetensors.index.json").is_file()
    import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert read_header(tmp_path / "out", "model") == read_header(imported["llama_tied"], "model")


def test_weights_under_other_names_are_refused(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(
        ModelImportError, match=r"needs model\.safetensors or .*only weights\.safetensors, which transf"
    ):
        import_model(str(folder), None, torch.float32, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "generation_config.json"]
)
@pytest.mark.parametrize("kind", ["cut off", "pointer", "list"])
def test_damaged_json_is_refused_in_one_line(name, kind, model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    if "index" in name:
        make_model("llama_tied").save_pretrained(folder, max_shard_size="40KB")
        (folder / "model.safetensors").unlink()
    text = (folder / name).read_text()
    (folder / name).write_text({"cut off": text[: len(text) // 2], "pointer": POINTER, "list": "[1]"}[kind])
    message = {
        "cut off": "is damaged|cannot read its tokenizer",
        "pointer": "Git LFS pointer",
        "list": "not a JSON object|cannot read its tokenizer",
    }
    with pytest.raises(ModelImportError, match=message[kind]) as error:
        import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"


@pytest.mark.parametrize(("key", "name"), [("rms_norm_eps", "config.json"), ("bos_token", "tokenizer_config.json")])
def test_a_key_given_twice_is_refused_by_name(key, name, model_folders, tmp_path):
    """json keeps the last of them without a message."""
    folder = tmp_path / "source"
    shutil.copytree(model_folders["llama_tied"], folder)
    path = folder / name
    text = path.read_text()
    path.write_text(text.replace("{", f'{{"{key}": 1,', 1))
    with pytest.raises(ModelImportError, match=rf"{name} has '{key}' twice in one object. Remove one of them"):
        import_model(str(folder), None, torch.float32, tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_git_lfs_pointers_are_refused_in_one_line(name, model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    (folder / name).write_text(POINTER)
    source = folder / name if name.endswith("gguf") else folder
    with pytest.raises(ModelImportError, match=rf"{name} is a Git LFS pointer, not the file itself\. Run: git lfs"):
        import_model(str(source), None, torch.float32, tmp_path / "out")


def test_fp8_weights_without_their_config_are_refused(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    name = "model.layers.1.mlp.up_proj.weight"
    broken(folder, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(
        ModelImportError, match=r"up_proj\.weight is stored as float8_e4m3fn, and its config names no quantization"
    ):
        import_model(str(folder), None, torch.float32, tmp_path / "out")


def test_padding_id_beyond_the_vocabulary_is_refused(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 320}))
    with pytest.raises(ModelImportError, match="pad_token_id=320 is beyond vocab_size=320"):
        import_model(str(folder), None, torch.float32, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 10**30, "num_hidden_layers=10{30} in its config is not a size"),
        ("vocab_size", 0, "vocab_size=0 in its config is not a size"),
        ("hidden_size", "48", "hidden_size=48 in its config is not a size"),
        ("max_position_embeddings", -256, "by its config texts have -256 positions"),
        ("max_position_embeddings", 0, "by its config texts have 0 positions"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": math.nan}, "do not fit .Out of range float values"),
    ],
)
def test_impossible_sizes_are_refused_before_a_model_is_built(key, value, message, model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    gate = functools.partial(check_import, limit=8 << 30)
    with pytest.raises(ModelImportError, match=message):
        import_model(str(folder), None, torch.float32, tmp_path / "out", check_result=gate)
    assert not (tmp_path / "out").exists()


def test_longrope_limits_the_planned_windows(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["phi3"], tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    config |= {"rope_parameters": rope, "original_max_position_embeddings": 16, "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config))

    def refuse(widths, blocks, max_positions, window):
        raise KeyError(max_positions)

    with pytest.raises(KeyError, match="16"):
        import_model(str(folder), None, torch.float32, tmp_path / "out", check_plan=refuse)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama_tied", "is_causal", False),
        ("llama_tied", "is_causal", None),  # which transformers takes for False
        ("qwen2", "is_causal", False),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "use_bidirectional_attention", "all"),
        ("phi3", "is_causal", False),
    ],
)
def test_attention_to_later_positions_is_refused_by_key(family, key, value, model_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(model_import, "_check_tensor", lambda *args: pytest.fail("a tensor was read"))
    folder = shutil.copytree(model_folders[family], tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UnsupportedModelError, match=rf"{key}={value!r} in its config: attention reads later positions"):
        import_model(str(folder), None, torch.float32, tmp_path / "out")


def test_explicitly_causal_attention_is_accepted(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_causal": True, "use_bidirectional_attention": False}))
    gate = functools.partial(check_import, limit=8 << 30)
    assert import_model(str(folder), None, torch.float32, tmp_path / "out", check_result=gate)["blocks"] == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.3.embed.weight", "model.layers.3.eh_proj.weight"], r"2 unexpected .*multi-token prediction"),
        (["score.weight"], r"save_pretrained\(COPY\), and the same with AutoTokenizer"),
        (
            ["model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight"],
            r"2 unexpected .*lora_A\.weight, .*LoRA adapters must be merged first",
        ),
        (["base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"], r"merge_and_unload"),
    ],
)
def test_surplus_tensors_are_named_with_the_remedy(names, message, model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    broken(folder, lambda t: t.update({name: torch.zeros(2, 2) for name in names}))
    with pytest.raises(ModelImportError, match=message):
        import_model(str(folder), None, torch.float32, tmp_path / "out")


def test_remedy_for_surplus_tensors_works(model_folders, imported, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    broken(folder, lambda t: t.update({"score.weight": torch.zeros(2, 2)}))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    import_model(str(tmp_path / "copy"), None, torch.float32, tmp_path / "out")
    assert read_header(tmp_path / "out", "model") == read_header(imported["llama_tied"], "model")


def test_tensors_that_the_class_ignores_are_left_out_and_named(model_folders, imported, tmp_path, monkeypatch, caplog):
    """Test with a class that ignores tensors, as Qwen3-Next's class ignores mtp.*."""
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    extra = {"mtp.fc.weight": torch.zeros(2, 2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    broken(folder, lambda t: t.update(extra))
    gate = functools.partial(check_import, limit=8 << 30)
    import_model(str(folder), None, torch.float32, tmp_path / "out", check_result=gate)
    assert read_header(tmp_path / "out", "model") == read_header(imported["llama_tied"], "model")
    assert "left out, as transformers does: model.layers.0.self_attn.rotary_emb.inv_freq, mtp.fc.weight" in caplog.text


def test_adapters_are_refused(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for _ in range(2):  # beside a whole model, and alone
        with pytest.raises(ModelImportError, match=r"holds an adapter \(adapter_config\.json\)\. Merge it into its"):
            import_model(str(folder), None, torch.float32, tmp_path / "out")
        for name in ("model.safetensors", "config.json"):
            (folder / name).unlink(missing_ok=True)


def test_chat_templates_in_their_folder_are_kept(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    assert sorted(path.name for path in (folder / "additional_chat_templates").iterdir()) == [
        "rag.jinja",
        "tool_use.jinja",
    ]
    (folder / "original").mkdir()
    (folder / "original/params.json").write_text("{}")
    import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates
    assert not (tmp_path / "out/original").exists()
    downloaded = filter_repo_objects(
        ["additional_chat_templates/rag.jinja", "original/params.json", "chat_template.jinja"],
        allow_patterns=model_import._HUB_FILES,
        ignore_patterns=model_import._HUB_SKIPPED,
    )
    assert list(downloaded) == ["additional_chat_templates/rag.jinja", "chat_template.jinja"]
