"""The chat template of a multimodal checkpoint, for text: moved to the tokenizer, and able to read plain strings.

Multimodal models have their template in a file of the processor, which a tokenizer does not read:
chat_template.jinja, chat_template.json, or the key `chat_template` of processor_config.json. Some of these templates
read the content of a message only as a list of parts. They read a string character by character, and write nothing.
"""

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.importing.source import ModelImportError, read_json_object
from pipeline.runtime.errors import reading

logger = logging.getLogger(__name__)

_JINJA, _JSON, _PROCESSOR = "chat_template.jinja", "chat_template.json", "processor_config.json"
# Files that only a processor reads. Next to a text model they would announce images.
PROCESSOR_FILES = (_JSON, _PROCESSOR, "preprocessor_config.json", "video_preprocessor_config.json")
_PROBE = "The quick brown fox"
_WRAP_STRINGS = """\
{%- set text_only = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set parts = [{'type': 'text', 'text': message['content']}] -%}
        {%- set text_only.messages = text_only.messages + [dict(message, content=parts)] -%}
    {%- else -%}
        {%- set text_only.messages = text_only.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = text_only.messages -%}
"""


def read_processor_template(source: str, folder: Path) -> str | None:
    """Return the chat template of the processor in a checkpoint folder, or None.

    Raises:
        ModelImportError: a file is damaged.
    """
    if (folder / _JINJA).is_file():
        return (folder / _JINJA).read_text(encoding="utf-8")
    for name in (_JSON, _PROCESSOR):
        if (folder / name).is_file():
            template = read_json_object(source, folder / name).get("chat_template")
            if isinstance(template, dict):  # several, by name
                template = template.get("default")
            if isinstance(template, str):
                return template
    return None


def settle_chat_template_(tokenizer: PreTrainedTokenizerBase, template: str | None, folder: Path) -> None:
    """Write chat_template.jinja for the tokenizer of a text model taken out of a multimodal one.

    Args:
        tokenizer: the tokenizer in `folder`. Gets the template.
        template: the processor's. It counts where the tokenizer has none of its own.
        folder: folder of the imported model. Files of the processor are removed.
    """
    for name in PROCESSOR_FILES:
        (folder / name).unlink(missing_ok=True)
    chosen: Any = tokenizer.chat_template or template
    if not isinstance(chosen, str):  # none, or several by name, which are the tokenizer's own
        return
    if not _renders(tokenizer, chosen, _PROBE):
        if _renders(tokenizer, _WRAP_STRINGS + chosen, _PROBE):
            chosen = _WRAP_STRINGS + chosen
        else:
            logger.warning("the chat template writes no text of a message whose content is a string")
    if chosen != tokenizer.chat_template or not (folder / _JINJA).is_file():
        (folder / _JINJA).write_text(chosen, encoding="utf-8")
    tokenizer.chat_template = chosen


def _renders(tokenizer: PreTrainedTokenizerBase, template: str, content: str) -> bool:
    """Return whether a template keeps the text of a message."""
    messages = [{"role": "user", "content": content}]
    try:
        with reading(ModelImportError):
            return content in str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except ModelImportError:  # the template raised an exception
        return False
