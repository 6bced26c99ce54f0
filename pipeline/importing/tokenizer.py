"""The tokenizer of an imported model: it loads, has a tokenizer.json, encodes any text, and fits the embedding."""

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.importing.source import ModelImportError, check_file, loading, read_json_object
from pipeline.models.checkpoint import CONFIG
from pipeline.models.special_tokens import read_token
from pipeline.runtime.artifacts import write_json
from pipeline.runtime.errors import reading

logger = logging.getLogger(__name__)

_CORE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# Ordinary text, then characters whose UTF-8 has every byte that may occur there. No vocabulary holds all of them.
_CODE_POINTS = [*range(0x100), *range(0x100, 0x800, 0x40), 0x800, *range(0x1000, 0x10000, 0x1000)]
_CODE_POINTS += range(0x10000, 0x110000, 0x8000)
_PROBE = "The quick brown fox, 0123456789. " + "".join(map(chr, _CODE_POINTS))


def complete_tokenizer_(source: str, folder: Path, rows: int) -> PreTrainedTokenizerBase:
    """Check the tokenizer in a checkpoint folder, and write its tokenizer.json there if it is missing.

    Args:
        source: as in params.yaml, for messages.
        rows: number of rows of the model's embedding.

    Raises:
        ModelImportError: it does not load, fails on some texts, or has tokens for which the embedding has no row.
    """
    for name in (_CORE, _CONFIG, "tokenizer.model"):
        if (folder / name).is_file():
            check_file(source, folder / name)
    with loading(source, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer("")  # some settings are only read when it is used
    if not (folder / _CORE).is_file() or not (folder / _CONFIG).is_file():
        tokenizer.save_pretrained(folder)
    if not (folder / _CORE).is_file():
        raise ModelImportError(
            f"model.source={source!r}: its tokenizer has no fast version ({_CORE}). Convert it with transformers first."
        )
    _check_rows(source, tokenizer, _list_special_tokens(source, tokenizer, folder), rows)
    _check_encoding(source, tokenizer, rows)
    return tokenizer


def keep_tokenizer_class_(source: str, companions: Path, folder: Path) -> None:
    """Name the tokenizer's class in tokenizer_config.json, if transformers would take another one by the new family.

    transformers chooses the class by tokenizer_config.json and by the model's family. Some classes split text in their
    own way, whatever tokenizer.json says.

    Args:
        source: as in params.yaml, for messages.
        companions: folder with the source's config.json and tokenizer.
        folder: with the config.json of another family, and copies of the tokenizer's files.

    Raises:
        ModelImportError: the tokenizer does not load, or transformers does not load the same one from `folder`.
    """
    if not (companions / CONFIG).is_file() or not (folder / _CORE).is_file():
        return
    with loading(source, "its tokenizer"):
        original = AutoTokenizer.from_pretrained(companions)
        if _read_core(AutoTokenizer.from_pretrained(folder)) == _read_core(original):
            return
        declared = read_json_object(source, folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
        write_json(folder / _CONFIG, declared | {"tokenizer_class": type(original).__name__})
        same = _read_core(AutoTokenizer.from_pretrained(folder)) == _read_core(original)
    if not same:
        raise ModelImportError(
            f"model.source={source!r}: transformers loads another tokenizer for the family as which this model is "
            f"imported than its own {type(original).__name__}. Report this with the model's name."
        )


def _read_core(tokenizer: PreTrainedTokenizerBase) -> str:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer.backend_tokenizer.to_str()


def _check_encoding(source: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse a tokenizer that fails on a text, turns it into nothing, or adds tokens that have no row.

    It fails where its token for unknown characters is missing from its vocabulary, and it meets such a character.
    """
    problem = f"model.source={source!r}: its tokenizer fails on texts with unknown characters"
    with reading(lambda reason: ModelImportError(f"{problem} ({reason}). Give its vocabulary an unknown token.")):
        token_ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        with_special = tokenizer(_PROBE)["input_ids"]
    if not token_ids:
        raise ModelImportError(
            f"model.source={source!r}: its tokenizer turns a text of {len(_PROBE)} characters into no token "
            f"(its vocabulary has {len(tokenizer)}). Take the tokenizer of the original model."
        )
    largest = max(with_special)
    if largest >= rows:
        raise ModelImportError(
            f"model.source={source!r}: its tokenizer gives a text the id {largest}, for which the model ({rows} rows) "
            "has no row. Take the tokenizer of the original model."
        )


def _list_special_tokens(source: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> set[str]:
    """Return the start, end, unknown and padding token."""
    declared = read_json_object(source, folder / _CONFIG)
    tokens = [declared.get(f"{name}_token") for name in ("unk", "pad")]
    names = {token["content"] if isinstance(token, dict) else token for token in tokens}
    return {
        str(name) for name in names | {read_token(tokenizer, "bos"), read_token(tokenizer, "eos")} if name is not None
    }


def _check_rows(source: str, tokenizer: PreTrainedTokenizerBase, special: set[str], rows: int) -> None:
    """Refuse a tokenizer with a token that has no row in the embedding, although a text may hold it.

    Text can contain ordinary tokens, added tokens, `special` ones, and tokens of a chat template. Other
    special tokens, such as Gemma 3's image token, are logged: `calibration` refuses a text that holds one.
    """
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    if not beyond:
        return
    added = tokenizer.added_tokens_decoder
    template = tokenizer.chat_template or ""
    templates = "\n".join(template.values()) if isinstance(template, dict) else template
    used = {
        token: index
        for token, index in beyond.items()
        if index not in added or not added[index].special or token in special or token in templates
    }
    listed = ", ".join(f"{token!r} ({index})" for token, index in sorted((used or beyond).items())[:3])
    if used:
        raise ModelImportError(
            f"model.source={source!r}: its tokenizer has ids that the model, with {rows} rows, has none for: {listed}. "
            "Resize the embedding (model.resize_token_embeddings(len(tokenizer))), or remove the tokens."
        )
    logger.warning("the tokenizer has ids that the model (%d rows) has no row for: %s; leave them out", rows, listed)
