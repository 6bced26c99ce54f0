import json

import pytest
import torch
from transformers import AutoTokenizer

from pipeline.importing.chat_template import PROCESSOR_FILES, read_processor_template, settle_chat_template_
from pipeline.importing.import_model import ModelImportError, import_model
from tests.conftest import make_tokenizer
from tests.importing.test_wrappers import make_wrapper, save_wrapper

# As Idefics 3's: content is a list of parts. A string is read character by character, and nothing is written.
PARTS = (
    "{% for message in messages %}{{message['role']}}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% endif %}{% if part['type'] == 'text' %}{{part['text']}}{% endif %}"
    "{% endfor %}{{'\\n'}}{% endfor %}"
)
PLAIN = "{% for message in messages %}[{{message['role']}}] {{message['content']}}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}]


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "processor_config.json"])
def test_the_template_of_a_processor_reads_strings_and_parts_after_the_import(place, tmp_path):
    save_wrapper(make_wrapper("smolvlm"), tmp_path / "source")
    content = PARTS if place.endswith("jinja") else json.dumps({"chat_template": PARTS})
    (tmp_path / "source" / place).write_text(content)
    import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "user: Hi\nassistant: Yes\n"
    assert not {path.name for path in (tmp_path / "out").iterdir()} & set(PROCESSOR_FILES)


def test_the_tokenizers_own_template_counts_first_and_a_plain_one_stays_as_it_is(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN
    settle_chat_template_(tokenizer, PARTS, tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == PLAIN == tokenizer.chat_template


def test_without_a_template_nothing_is_written_and_a_failing_one_is_kept(tmp_path, caplog):
    settle_chat_template_(make_tokenizer(), None, tmp_path)
    assert not list(tmp_path.iterdir())
    settle_chat_template_(make_tokenizer(), "{{ raise_exception('no') }}", tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ raise_exception('no') }}"
    assert "writes no text" in caplog.text


def test_a_template_is_read_by_name_and_a_damaged_file_is_refused(tmp_path):
    assert read_processor_template("x", tmp_path) is None
    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": {"default": PLAIN, "tool": PARTS}}))
    assert read_processor_template("x", tmp_path) == PLAIN
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ModelImportError, match=r"chat_template\.json is damaged"):
        read_processor_template("x", tmp_path)
