"""Tokenizers of sources: they load, encode any text, and have no id that the embedding lacks, or are refused."""

import json
import shutil

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer

from pipeline.importing.import_model import ModelImportError, import_model
from tests.conftest import PROSE_FILE, make_tokenizer


@pytest.fixture
def source(model_folders, tmp_path):
    return shutil.copytree(model_folders["llama_tied"], tmp_path / "source")


def import_source(source, **options):
    return import_model(str(source), None, torch.float32, source.parent / "out", **options)


def change_json(path, **changes):
    """Set keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_core(source, model=None, **changes):
    """Change tokenizer.json, and its part `model`."""
    core = json.loads((source / "tokenizer.json").read_text())
    change_json(source / "tokenizer.json", model=core["model"] | (model or {}), **changes)


def test_ids_without_a_row_are_refused_unless_texts_lack_them(model_folders, tmp_path, caplog):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert "no row for: '<image>' (320); leave them out" in caplog.text
    tokenizer.chat_template = "{{ messages[0]['content'] }}<image>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelImportError, match=r"the model, with 320 rows, has none for: '<image>' \(320\)"):
        import_model(str(folder), None, torch.float32, tmp_path / "out")
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelImportError, match=r"has none for: '<image>' \(320\)"):
        import_model(str(folder), None, torch.float32, tmp_path / "other")
    text = (model_folders["llama_tied"] / "tokenizer.json").read_text()
    core = json.loads(text)
    token = max(core["model"]["vocab"], key=core["model"]["vocab"].get)
    core["model"]["vocab"][token] = 400
    shutil.copytree(model_folders["llama_tied"], folder, dirs_exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(core))
    with pytest.raises(ModelImportError, match=r"has none for: .* \(400\)"):
        import_model(str(folder), None, torch.float32, tmp_path / "other")


def test_tokenizer_that_loads_and_fails_in_use_is_refused(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": "long"}))
    with pytest.raises(ModelImportError, match=r"transformers cannot read its tokenizer \('>' not supported"):
        import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sentencepiece_tokenizer_is_converted(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    for path in folder.glob("*token*"):
        path.unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(PROSE_FILE),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=200,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").is_file()
    core = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "The bridge was built in three summers."
    token_ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text, add_special_tokens=False).input_ids
    assert token_ids == core.encode(text)


WHITESPACE = {"type": "Whitespace"}
SPECIAL = {"<s>": 0, "</s>": 1}
PIECES = [["<s>", 0.0], ["</s>", 0.0], ["The", -1.0]]


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"unk_token": "<unk>"}, {"pre_tokenizer": WHITESPACE}, r"Unk token `<unk>` not found in the vocabulary"),
        ({"type": "WordLevel", "vocab": SPECIAL | {"The": 2}, "unk_token": "?"}, {}, r"Missing \[UNK\] token"),
        ({"type": "Unigram", "vocab": PIECES, "unk_id": None}, {}, r"`unk_id` is missing"),
        ({"unk_token": "<unk>", "byte_fallback": True}, {"pre_tokenizer": WHITESPACE}, r"Unk token `<unk>` not found"),
    ],
)
def test_unknown_token_missing_from_the_vocabulary_is_refused(model, changes, message, source):
    change_core(source, model, **changes)
    with pytest.raises(
        ModelImportError,
        match=rf"fails on texts with unknown characters \(.*{message}.*Give its vocabulary",
    ):
        import_source(source)
    assert not (source.parent / "out").exists()


def test_unknown_token_that_transformers_adds_without_a_row_is_refused(source):
    change_json(source / "tokenizer_config.json", unk_token="<unk>")
    with pytest.raises(ModelImportError, match=r"has none for: '<unk>' \(320\)\. Resize the embedding"):
        import_source(source)


def test_byte_level_tokenizers_need_no_unknown_token(source):
    change_core(source, {"unk_token": "<unk>"})
    assert import_source(source)["blocks"] == 3


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ({"vocab": {}, "merges": []}, {}),
        ({"vocab": {}, "merges": []}, {"added_tokens": []}),
        ({}, {"normalizer": {"type": "Replace", "pattern": {"Regex": "[^☃]"}, "content": ""}}),
    ],
)
def test_a_tokenizer_that_turns_text_into_nothing_is_refused(model, changes, source):
    change_core(source, model, **changes)
    with pytest.raises(ModelImportError, match=r"turns a text of \d+ characters into no token \(its vocabulary"):
        import_source(source)


def test_token_added_without_a_row_is_refused(source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(source)
    with pytest.raises(ModelImportError, match=r"the model, with 320 rows, has none for: '<new>' \(320\)\. Resize"):
        import_source(source)


def test_token_of_any_chat_template_without_a_row_is_refused(source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<call>"], special_tokens=True)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }}<call>"}
    tokenizer.save_pretrained(source)
    with pytest.raises(ModelImportError, match=r"has none for: '<call>' \(320\)"):
        import_source(source)


def test_id_of_the_post_processor_without_a_row_is_refused(source):
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}, sequence],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<x>": {"id": "<x>", "ids": [999], "tokens": ["<x>"]}},
    }
    change_core(source, post_processor=template)
    with pytest.raises(ModelImportError, match=r"gives a text the id 999, for which the model \(320 rows\) has no row"):
        import_source(source)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("key", "value"), [("bos_token_id", 320), ("eos_token_id", 320), ("eos_token_id", [1, 400]), ("pad_token_id", 320)]
)
def test_special_ids_beyond_the_embedding_are_refused_by_key(name, key, value, source):
    change_json(source / name, **{key: value})
    with pytest.raises(ModelImportError, match=rf"{key}=.*(320|400\]) is beyond vocab_size=320. Correct it in {name}"):
        import_source(source)
    assert not (source.parent / "out").exists()


def test_tokenizer_is_checked_before_any_tensor_is_read(source, monkeypatch):
    monkeypatch.setattr("pipeline.importing.import_model._check_tensor", lambda *args: pytest.fail("a tensor was read"))
    change_core(source, {"vocab": {}, "merges": []})
    with pytest.raises(ModelImportError, match="turns a text"):
        import_source(source)
    shutil.copyfile(source.parent / "source/config.json", source / "generation_config.json")
    (source / "generation_config.json").write_text("{")
    with pytest.raises(ModelImportError, match=r"generation_config\.json is damaged"):
        import_source(source)

    def refuse(tokenizer):
        raise KeyError(tokenizer.eos_token)

    make_tokenizer().save_pretrained(source)
    (source / "generation_config.json").write_text("{}")
    with pytest.raises(KeyError, match="</s>"):
        import_source(source, check_tokenizer=refuse)
