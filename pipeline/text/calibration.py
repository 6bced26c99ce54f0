"""Cut documents into token windows that never overlap, one artifact per split.

Search and training windows come from a corpus's train documents, dealt apart document by document, those for training
end to end from the same as training windows, last documents first, validation windows from its validation documents:
no two splits share text, where there is enough of it. Documents are shuffled by seed, tokenized, joined by blank lines
and cut in order. Held-out evaluation windows are cut the field's way: the whole test split, joined by blank
lines, in consecutive windows. No special tokens are among them: what stands in front of each window, if anything, is
told apart (`windows.py`), and every variant of a model is judged on exactly these ids. Documents that are conversations
become text by the tokenizer's own chat template.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pipeline.runtime.artifacts import ArtifactError, fingerprint, fingerprint_file, make_header
from pipeline.runtime.errors import PipelineError, reading
from pipeline.text.corpora import read_documents
from pipeline.text.params import split_windows
from pipeline.text.rows import Document
from pipeline.text.windows import Windows

# Search windows take every fourth train document, training windows the rest.
_SEARCH_SHARE = 4
_SEPARATOR = "\n\n"
_PIECE = 16  # tokens that two texts hardly have in common unless one is the other's


class WindowsError(PipelineError):
    """A corpus cannot give the windows asked for: too few tokens, saying how many, or no chat template for it."""


def load_tokenizer(model_folder: Path) -> tuple[Any, str]:
    """The tokenizer of a checkpoint folder and the fingerprint of its tokenizer.json. Raises ArtifactError."""
    path = model_folder / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; rerun the stage that makes it: dvc repro model")
    remedy = "rerun the stage that makes it: dvc repro model"
    with reading(lambda why: ArtifactError(f"the tokenizer in {model_folder} is damaged ({why}); {remedy}")):
        return AutoTokenizer.from_pretrained(model_folder), fingerprint_file(path)


def render_documents(documents: list[Document], tokenizer: Any, what: str) -> list[str]:
    """Documents as text: conversations by the tokenizer's chat template.

    A start token that the template puts at the very beginning alone is left out: whether texts begin with one,
    `calibration.start_token` says.

    Raises:
        WindowsError: there is no template, or it refuses a conversation; names `what`.
    """
    if tokenizer.chat_template is None and not all(isinstance(document, str) for document in documents):
        raise WindowsError(f"{what}: holds conversations, but the tokenizer has no chat template; use plain text")
    texts, start = [], tokenizer.bos_token
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, str):
            with reading(lambda why: WindowsError(f"{what}: the chat template refuses conversation {number} ({why})")):  # noqa: B023
                document = tokenizer.apply_chat_template(document, tokenize=False)
            if start and document.rfind(start) == 0:
                document = document.removeprefix(start)
        texts.append(document)
    return texts


def count_conversations(documents: list[Document]) -> int:
    return sum(not isinstance(document, str) for document in documents)


def _identify(documents: list[Document], tokenizer: Any, tokenizer_id: str) -> str:
    """What token ids depend on beside the documents: the tokenizer, and its template where that is used."""
    used = count_conversations(documents)
    return fingerprint([tokenizer_id, tokenizer.chat_template]) if used else tokenizer_id


def cut_calibration_windows(
    split: str,
    corpora: list[str] | dict[str, float],
    windows: int,
    length: int,
    seed: int,
    data: Path,
    tokenizer: Any,
    tokenizer_id: str,
) -> Windows:
    """Windows for `search`, `train`, `end_to_end` or `validation`, of each corpus evenly spread over all.

    Args:
        split: which documents to use, see the module's docstring.
        corpora: names of folders below `data`; several are a mix, in equal parts or by the shares of a mapping
            (`split_windows`).
        windows, length: how many, of how many tokens.
        seed: of the order of documents.
        tokenizer, tokenizer_id: a transformers tokenizer and the fingerprint of its file.

    Raises:
        WindowsError: a corpus has too few tokens.
    """
    source = "validation" if split == "validation" else "train"
    parts, identities = [], set[str]()
    for corpus, share in split_windows(windows, corpora).items():
        what = f"calibration.{split} from {corpus}"
        documents = read_documents(data / corpus / f"{source}.jsonl")
        identities.add(_identify(documents, tokenizer, tokenizer_id))
        documents = _shuffle(render_documents(documents, tokenizer, what), seed)
        if split == "search":
            documents = documents[::_SEARCH_SHARE]
        elif source == "train":
            documents = [text for place, text in enumerate(documents) if place % _SEARCH_SHARE]
        if split == "end_to_end":
            documents = documents[::-1]
        parts.append(_cut(_tokenize(documents, tokenizer), share, length, what))
    places = [((2 * row + 1) / len(part), part[row]) for part in parts for row in range(len(part))]
    order = [window for _, window in sorted(places, key=lambda place: place[0])]
    values = {
        "tokenizer": max(identities - {tokenizer_id}, default=tokenizer_id),
        "corpora": {corpus: fingerprint_file(data / corpus / f"{source}.jsonl") for corpus in corpora},
        "order": list(corpora.items()) if isinstance(corpora, dict) else corpora,
        "seed": seed,
        "split": split,
        "windows": windows,
        "length": length,
    }
    return Windows(torch.stack(order), make_header("calibration", values))


def count_shared(windows: torch.Tensor, others: torch.Tensor) -> int:
    """How many of `windows` [N, T] are mostly of the text of `others` [K, T']: as most of their pieces are."""
    if min(windows.shape[1], others.shape[1]) < _PIECE:
        return 0
    factors = torch.randint(2**62, (_PIECE,), generator=torch.Generator().manual_seed(0))
    known = (others.unfold(1, _PIECE, 1) * factors).sum(-1)  # a number for each piece, modulo 2^64
    shared = torch.isin((windows.unfold(1, _PIECE, _PIECE) * factors).sum(-1), known)
    return int((2 * shared.sum(1) > shared.shape[1]).sum())


def cut_evaluation_windows(
    corpus: str, windows: int | None, length: int, data: Path, tokenizer: Any, tokenizer_id: str
) -> Windows:
    """The first `windows` (None: all) consecutive windows of a corpus's test split; a shorter rest is left out.

    Raises:
        WindowsError: the split has too few tokens.
    """
    path = data / corpus / "test.jsonl"
    documents = read_documents(path)
    token_ids = cut_documents(documents, windows, length, tokenizer, f"calibration.evaluation from {corpus}")
    values = {
        "tokenizer": _identify(documents, tokenizer, tokenizer_id),
        "corpus": fingerprint_file(path),
        "windows": windows,
        "length": length,
    }
    return Windows(token_ids, make_header("calibration", values))


def cut_documents(
    documents: list[Document], windows: int | None, length: int, tokenizer: Any, what: str
) -> torch.Tensor:
    """The first `windows` (None: all) windows [N, T] of documents joined by blank lines; a shorter rest is left out.

    Raises:
        WindowsError: too few tokens, or no chat template; names `what`.
    """
    needed = None if windows is None else windows * length
    texts = render_documents(documents, tokenizer, what)
    return _cut(iter([_tokenize_joined(texts, tokenizer, needed)]), windows, length, what)


def _shuffle(documents: list[str], seed: int) -> list[str]:
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return [documents[place] for place in order.tolist()]


def _tokenize(documents: list[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids document by document, so that a large corpus is read only as far as needed.

    The separator is tokenized together with the document before it.
    """
    for place, text in enumerate(documents):
        joined = text + _SEPARATOR if place + 1 < len(documents) else text
        yield tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]


def _tokenize_joined(documents: list[str], tokenizer: Any, needed: int | None) -> list[int]:
    """Token ids of all documents joined by blank lines, or of a beginning that is long enough for `needed` of them.

    Tokenized as one text, as the field does. A beginning's last tokens may differ from the whole text's (a word cut
    short), hence the margin.
    """
    text = _SEPARATOR.join(documents)
    margin = 64
    length = len(text) if needed is None else 8 * needed
    while True:
        ids = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"]
        if length >= len(text) or (needed is not None and len(ids) >= needed + margin):
            return ids
        length *= 2


def _cut(pieces: Iterator[list[int]], windows: int | None, length: int, what: str) -> torch.Tensor:
    needed = windows * length if windows is not None else None
    ids: list[int] = []
    for piece in pieces:
        ids.extend(piece)
        if needed is not None and len(ids) >= needed:
            break
    count = windows if windows is not None else len(ids) // length
    if len(ids) < max(count, 1) * length:
        raise WindowsError(
            f"{what}: needs {max(count, 1)} windows of {length} = {max(count, 1) * length} tokens, the corpus has "
            f"{len(ids)}; ask for fewer or shorter windows, or raise corpora.*.max_documents"
        )
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)
