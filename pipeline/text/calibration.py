"""Cut documents into token windows that never overlap, one artifact per split.

Which documents of a corpus go to which split:

    search        every fourth train document
    train         the other train documents
    end_to_end    the same documents as train, last ones first
    validation    the validation documents
    evaluation    the test documents

So no two splits share text, as long as there is enough of it for `train` and `end_to_end`. Documents of the first four
are shuffled by seed, tokenized, joined by blank lines and cut in order. Evaluation windows are cut the field's way: the
whole test split in its order, joined by blank lines, in consecutive windows.

Windows hold no special tokens of their own. Whether a start token comes before each is stored next to them
(`windows.py`), so every variant of a model is judged on the same ids. Conversations become text by the tokenizer's own
chat template.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.models.special_tokens import read_token
from pipeline.runtime.artifacts import ArtifactError, fingerprint, fingerprint_file, make_header
from pipeline.runtime.errors import PipelineError, reading
from pipeline.text.conversations import Conversation, find_unread_fields, render_conversation
from pipeline.text.corpora import read_documents
from pipeline.text.params import split_windows
from pipeline.text.rows import Document
from pipeline.text.windows import Windows

logger = logging.getLogger(__name__)

_SEARCH_STRIDE = 4
_SEPARATOR = "\n\n"
_PIECE = 16  # tokens; two texts that share as many in a row have hardly come to them independently


class WindowsError(PipelineError):
    """A corpus cannot give the windows that are asked for."""


def load_tokenizer(model_folder: Path) -> tuple[PreTrainedTokenizerBase, str]:
    """Return the tokenizer of a checkpoint folder and the fingerprint of its tokenizer.json.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    path = model_folder / "tokenizer.json"
    remedy = "Rerun the stage that makes it: dvc repro model"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing. {remedy}")
    with reading(lambda reason: ArtifactError(f"the tokenizer in {model_folder} is damaged ({reason}). {remedy}")):
        return AutoTokenizer.from_pretrained(model_folder), fingerprint_file(path)


def render_documents(documents: list[Document], tokenizer: PreTrainedTokenizerBase, purpose: str) -> list[str]:
    """Return documents as text: conversations by the tokenizer's chat template.

    A start token that the template puts at the very beginning, and nowhere else, is left out:
    `calibration.start_token` says whether texts begin with one.

    Args:
        purpose: the split and the corpus, for messages.

    Raises:
        WindowsError: there is no template, or it refuses a conversation.
    """
    conversations = [document for document in documents if not isinstance(document, str)]
    if conversations and tokenizer.chat_template is None:
        raise WindowsError(
            f"{purpose}: holds conversations, but the tokenizer has no chat template. Use plain text, or another model."
        )
    if unread := find_unread_fields(conversations, tokenizer):
        logger.warning("%s: the chat template leaves out these fields of messages: %s", purpose, ", ".join(unread))
    problem = f"{purpose}: the chat template refuses conversation"
    return [
        document if isinstance(document, str) else _render(document, tokenizer, f"{problem} {number}")
        for number, document in enumerate(documents, start=1)
    ]


def _render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, problem: str) -> str:
    with reading(lambda reason: WindowsError(f"{problem} ({reason}).")):
        text = render_conversation(conversation, tokenizer)
    start = read_token(tokenizer, "bos")
    return text.removeprefix(start) if start and text.rfind(start) == 0 else text


def count_conversations(documents: list[Document]) -> int:
    """Return how many documents are conversations."""
    return sum(not isinstance(document, str) for document in documents)


def cut_calibration_windows(
    split: str,
    *,
    corpora: list[str] | dict[str, float],
    windows: int,
    length: int,
    seed: int,
    folders: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_id: str,
) -> Windows:
    """Return the windows of a split, with the windows of each corpus spread evenly.

    Args:
        split: `search`, `train`, `end_to_end` or `validation`; see the module's docstring.
        corpora: names of corpora. A list gives equal parts, a mapping its proportions (`split_windows`).
        folders: name of a corpus -> the folder with its splits.
        windows: how many.
        length: tokens of a window.
        seed: seed of the order of documents.
        tokenizer: a transformers tokenizer.
        tokenizer_id: the fingerprint of its file.

    Raises:
        WindowsError: a corpus has too few tokens.
    """
    source = "validation" if split == "validation" else "train"
    parts, conversations = [], 0
    for corpus, count in split_windows(windows, corpora).items():
        purpose = f"calibration.{split} from {corpus}"
        documents = read_documents(folders[corpus] / f"{source}.jsonl")
        conversations += count_conversations(documents)
        texts = _choose_texts(split, _shuffle(render_documents(documents, tokenizer, purpose), seed))
        parts.append(_cut(_tokenize(texts, tokenizer), count, length, purpose))
    values = {
        "tokenizer": _identify(tokenizer, tokenizer_id, conversations),
        "corpora": {corpus: fingerprint_file(folders[corpus] / f"{source}.jsonl") for corpus in corpora},
        "order": list(corpora.items()) if isinstance(corpora, dict) else corpora,
        "seed": seed,
        "split": split,
        "windows": windows,
        "length": length,
    }
    return Windows(_spread_evenly(parts), make_header("calibration", values))


def cut_evaluation_windows(
    corpus: str,
    *,
    windows: int | None,
    length: int,
    folders: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_id: str,
) -> Windows:
    """Return the first `windows` (None: all) consecutive windows of a corpus's test split, without its shorter rest.

    Args:
        folders: name of a corpus -> the folder with its splits.

    Raises:
        WindowsError: the split has too few tokens.
    """
    path = folders[corpus] / "test.jsonl"
    documents = read_documents(path)
    token_ids = cut_documents(documents, windows, length, tokenizer, f"calibration.evaluation from {corpus}")
    values = {
        "tokenizer": _identify(tokenizer, tokenizer_id, count_conversations(documents)),
        "corpus": fingerprint_file(path),
        "windows": windows,
        "length": length,
    }
    return Windows(token_ids, make_header("calibration", values))


def cut_documents(
    documents: list[Document],
    windows: int | None,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    purpose: str,
) -> torch.Tensor:
    """Return the first `windows` (None: all) windows of documents joined by blank lines, as [N, T].

    A rest that is shorter than a window is left out.

    Raises:
        WindowsError: too few tokens, or no chat template for conversations; names `purpose`.
    """
    needed = None if windows is None else windows * length
    texts = render_documents(documents, tokenizer, purpose)
    return _cut(iter([_tokenize_joined(texts, tokenizer, needed)]), windows, length, purpose)


def check_token_ids(token_ids: torch.Tensor, rows: int, tokenizer: PreTrainedTokenizerBase, purpose: str) -> None:
    """Refuse texts that hold a token for which the model's embedding of `rows` rows has none.

    The import lets special tokens without a row pass, such as the image token of Gemma 3: texts rarely hold them.

    Raises:
        WindowsError: names the token and `purpose`.
    """
    largest = int(token_ids.max()) if token_ids.numel() else 0
    if largest >= rows:
        raise WindowsError(
            f"{purpose}: holds the special token {tokenizer.convert_ids_to_tokens(largest)!r} ({largest}), for which "
            f"the model's embedding has no row ({rows} rows). Take that text out of the corpus."
        )


def count_overlapping_windows(windows: torch.Tensor, others: torch.Tensor) -> int:
    """Return how many of `windows` [N, T] hold mostly text of `others` [K, T'].

    A window counts if most of its pieces of 16 tokens occur in `others` as well.
    """
    if min(windows.shape[1], others.shape[1]) < _PIECE:
        return 0
    # Each piece becomes one number, modulo 2^64, by random factors for its tokens.
    factors = torch.randint(2**62, (_PIECE,), generator=torch.Generator().manual_seed(0))
    known = (others.unfold(1, _PIECE, 1) * factors).sum(-1)
    repeated = torch.isin((windows.unfold(1, _PIECE, _PIECE) * factors).sum(-1), known)
    return int((2 * repeated.sum(1) > repeated.shape[1]).sum())


def _choose_texts(split: str, texts: list[str]) -> list[str]:
    """Return the texts of one split, from the split of the source that it reads; see the module's docstring."""
    if split == "validation":
        return texts
    if split == "search":
        return texts[::_SEARCH_STRIDE]
    rest = [text for place, text in enumerate(texts) if place % _SEARCH_STRIDE]
    return rest[::-1] if split == "end_to_end" else rest


def _spread_evenly(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the rows of all parts [n, T] as one tensor [N, T], each part spread evenly over it, in its own order.

    Row i of n belongs to the fraction (i + 1/2) / n of the whole. Where two fractions are equal, the earlier part comes
    first: parts of 3 and 1 rows give a0 a1 b0 a2.
    """
    places = [((2 * row + 1) / len(part), part[row]) for part in parts for row in range(len(part))]
    return torch.stack([window for _, window in sorted(places, key=lambda place: place[0])])


def _identify(tokenizer: PreTrainedTokenizerBase, tokenizer_id: str, conversations: int) -> str:
    """Return the fingerprint of the tokenizer, and of its chat template where there are conversations."""
    return fingerprint([tokenizer_id, tokenizer.chat_template]) if conversations else tokenizer_id


def _shuffle(texts: list[str], seed: int) -> list[str]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts[place] for place in order.tolist()]


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield token ids text by text, so that a large corpus is tokenized only as far as it is needed.

    The separator is tokenized together with the text before it.
    """
    for place, text in enumerate(texts):
        joined = text + _SEPARATOR if place + 1 < len(texts) else text
        yield tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]


def _tokenize_joined(texts: list[str], tokenizer: PreTrainedTokenizerBase, needed: int | None) -> list[int]:
    """Return the token ids of all texts joined by blank lines, or of a beginning with at least `needed` tokens.

    It is tokenized as one text, as the field does. The last tokens of a beginning may differ from the whole's (a word
    cut short), hence a margin.
    """
    text = _SEPARATOR.join(texts)
    margin = 64
    length = len(text) if needed is None else 8 * needed
    while True:
        ids = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"]
        if length >= len(text) or (needed is not None and len(ids) >= needed + margin):
            return ids
        length *= 2


def _cut(pieces: Iterator[list[int]], windows: int | None, length: int, purpose: str) -> torch.Tensor:
    needed = windows * length if windows is not None else None
    ids: list[int] = []
    for piece in pieces:
        ids.extend(piece)
        if needed is not None and len(ids) >= needed:
            break
    count = windows if windows is not None else len(ids) // length
    if len(ids) < max(count, 1) * length:
        raise WindowsError(
            f"{purpose}: needs {max(count, 1)} windows of {length} = {max(count, 1) * length} tokens, the corpus has "
            f"{len(ids)}. Ask for fewer or shorter windows, or give more text (corpora.*.max_documents)."
        )
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)
