"""How texts are put to an exported model: its tokenizer, the tokens before every text, the positions that are left.

Commands read this from the folder's small files first, so that a text that is missing or too long is refused before
weights are loaded.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.inference.manifest import ExportError, read_manifest
from pipeline.inference.transformers_quantizer import PrefixQuantConfig
from pipeline.models.architectures import find_max_positions
from pipeline.runtime.errors import reading


@dataclass(frozen=True)
class TextInterface:
    """The facts about a model that decide how a text is put to it.

    Attributes:
        prefix_tokens: P, 0 without a prefix.
        start_token_id: the start token that a text must not begin with, because the prefix ends in it, or None.
        text_start_token_id: the start token between the prefix and every text, or None.
        max_positions: the longest sequence, with prefix and start token.
        vocab_size: rows of the embedding.
    """

    tokenizer: PreTrainedTokenizerBase
    prefix_tokens: int
    start_token_id: int | None
    text_start_token_id: int | None
    max_positions: int
    vocab_size: int

    @property
    def tokens_before_text(self) -> int:
        """Return how many tokens come before a window that holds no start token of its own."""
        return self.prefix_tokens + (self.text_start_token_id is not None)


def describe_interface(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TextInterface:
    """Return the interface of a model in memory, with or without a prefix."""
    prefix_kv = getattr(model, "prefix_kv", None)
    return TextInterface(
        tokenizer,
        prefix_tokens=0 if prefix_kv is None else prefix_kv.shape[-2],
        start_token_id=getattr(model, "start_token_id", None),
        text_start_token_id=getattr(model, "text_start_token_id", None),
        max_positions=find_max_positions(model.config),
        vocab_size=model.config.vocab_size,
    )


def read_interface(folder: Path) -> TextInterface:
    """Return the interface of an exported model, from manifest, config and tokenizer alone: no weights are read.

    Raises:
        ExportError: the folder is not an exported one, or these files are missing or damaged.
    """
    read_manifest(folder)
    with reading(lambda why: ExportError(f"{folder} cannot be loaded ({why}).")):
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        quantization = PrefixQuantConfig(**config.quantization_config)
        return TextInterface(
            tokenizer,
            prefix_tokens=quantization.prefix["tokens"],
            start_token_id=quantization.prefix["start_token_id"],
            text_start_token_id=quantization.text_start_token_id,
            max_positions=find_max_positions(config),
            vocab_size=config.vocab_size,
        )
