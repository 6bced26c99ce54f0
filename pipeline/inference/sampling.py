"""Text that a model writes, as a corpus to calibrate and to train on (arXiv:2305.17888).

    sampler = Sampler(model, tokenizer, params)
    for batch in itertools.count():
        documents = sampler.sample_batch(batch)              # lists of token ids

Every document starts from the same few tokens (`find_beginning`) and ends with a token that ends texts, or at
`generation.length`. The next token is drawn from softmax(logits / temperature), restricted by `top_p` to the most
likely tokens. The random numbers of a document depend only on the seed and on its number. So a batch can be sampled
again without the ones before it, and a killed run continues at the first missing batch, with the same bytes.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from pipeline.runtime.artifacts import Header, load_unfinished, save_tensors
from pipeline.runtime.errors import PipelineError, reading
from pipeline.runtime.progress import show_progress
from pipeline.text.corpora import deal_documents, write_splits
from pipeline.text.params import GenerationParams
from pipeline.text.sampled import DocumentFilter

logger = logging.getLogger(__name__)

# Tokens that separate documents in pretraining, by families: GPT-2, Qwen, SmolLM, Phi; Llama 3; GPT-OSS.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|startoftext|>")
_LIKELIEST = 1024  # tokens that are sorted first; more only where they have less than top_p of the probability
_MOST_DROPPED = 4  # sampling ends in an error once it has drawn this many times the tokens that are asked for


class SamplingError(PipelineError):
    """A model cannot write the corpus that is asked for."""


class Sampler:
    """Samples documents from a model, in batches.

    Attributes:
        beginning: token ids that every document starts from; they are not part of it.
        ends: token ids that end a document; they are not part of it either.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: GenerationParams, name: str = "corpus"
    ) -> None:
        """Check that the model has positions for documents of `params.length` tokens.

        Args:
            model: in eval mode, on its device.
            name: name of the corpus, for messages.

        Raises:
            SamplingError: documents are too long, or the tokenizer has no beginning of the kind that is asked for.
        """
        self.model, self.tokenizer, self.params, self.name = model, tokenizer, params, name
        rows = model.config.vocab_size
        self.beginning = find_beginning(tokenizer, params.beginning, rows, f"corpora.{name}.generation")
        self.ends = find_ends(model, tokenizer)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and len(self.beginning) + params.length > limit:
            raise SamplingError(
                f"corpora.{name}.generation.length={params.length}: with the {len(self.beginning)} tokens of the "
                f"beginning, it exceeds the {limit} positions of this model. Use at most {limit - len(self.beginning)}"
            )

    @torch.no_grad()
    def sample_batch(self, batch: int, title: str = "sampling") -> list[list[int]]:
        """Return the documents of a batch as token ids, without their beginning and end.

        Args:
            batch: number of the batch. Documents batch * batch_size … have random numbers of their own.
            title: title of the progress bar over tokens.
        """
        params, device = self.params, self.model.device
        uniforms = self._draw_uniforms(batch)
        documents: list[list[int]] = [[] for _ in range(params.batch_size)]
        active = list(range(params.batch_size))
        inputs = torch.tensor([self.beginning] * params.batch_size, device=device)
        cache = DynamicCache(config=self.model.config)
        ends = torch.tensor(sorted(self.ends))
        for place in show_progress(range(params.length), params.length, title, "token"):
            logits = self.model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            logits = logits[:, -1, : len(self.tokenizer)].float()
            drawn = draw_tokens(logits, uniforms[active, place].to(device), params.temperature, params.top_p).cpu()
            left = torch.isin(drawn, ends, invert=True).nonzero().flatten().tolist()
            if not left:
                break
            for row in left:
                documents[active[row]].append(int(drawn[row]))
            if len(left) < len(active):  # finished documents leave the batch
                cache.batch_select_indices(torch.tensor(left, device=device))
                active = [active[row] for row in left]
            inputs = drawn[left].unsqueeze(1).to(device)
        return documents

    def _draw_uniforms(self, batch: int) -> torch.Tensor:
        """Return the random numbers of a batch, float64 [B, length] in [0, 1), on the CPU."""
        rows = []
        for number in range(batch * self.params.batch_size, (batch + 1) * self.params.batch_size):
            # Neighbouring seeds give independent streams; a large odd factor keeps those of two corpora apart.
            generator = torch.Generator().manual_seed(self.params.seed * 1_000_000_007 + number)
            rows.append(torch.rand(self.params.length, generator=generator, dtype=torch.float64))
        return torch.stack(rows)


def draw_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Draw a token for each row by the inverse of the cumulative distribution, [B] int64.

    Args:
        logits: [B, V] float32.
        uniforms: [B] float64 in [0, 1).
        temperature: above 0; the logits are divided by it.
        top_p: keep the most likely tokens, up to the one with which their probabilities reach this sum.
    """
    p = (logits / temperature).softmax(-1)
    if top_p == 1:
        return _invert(p, uniforms)
    likely, order = p.topk(min(_LIKELIEST, p.shape[-1]))
    if likely.sum(-1).min() < top_p:
        likely, order = p.sort(dim=-1, descending=True, stable=True)
    before = likely.double().cumsum(-1) - likely
    left = likely.masked_fill(before >= top_p, 0)
    return order.gather(-1, _invert(left, uniforms).unsqueeze(-1)).squeeze(-1)


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the index at which the cumulative sum of each row exceeds its uniform number's share of the total, [B]."""
    sums = weights.double().cumsum(-1)
    targets = uniforms.unsqueeze(-1) * sums[:, -1:]
    places = torch.searchsorted(sums, targets, right=True).squeeze(-1)
    # Rounding may bring a target to the total itself: the last token with a probability takes it.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.minimum(places, last)


def find_beginning(tokenizer: PreTrainedTokenizerBase, kind: str, rows: int, key: str = "generation") -> list[int]:
    """Return the token ids that a sampled document starts from.

    Args:
        kind: `end_of_text`: the start token where the tokenizer puts one before every text, otherwise the token that
            separates documents in pretraining, otherwise the start or the end token. `chat_template`: an empty turn of
            the user, up to the model's answer.
        rows: number of rows of the model's embedding; tokens without a row cannot be chosen.
        key: key of params.yaml, for messages.

    Raises:
        SamplingError: there is none.
    """
    if kind == "chat_template":
        if tokenizer.chat_template is None:
            raise SamplingError(f"{key}.beginning={kind}: the tokenizer has no chat template. Use end_of_text.")
        with reading(lambda why: SamplingError(f"{key}.beginning={kind}: the template refuses an empty turn ({why}).")):
            turns = [{"role": "user", "content": ""}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return tokenizer(cast(str, text), add_special_tokens=False)["input_ids"]
    empty_text = tokenizer("")["input_ids"]
    if empty_text[:1] == [tokenizer.bos_token_id]:
        return empty_text[:1]
    vocabulary = tokenizer.get_vocab()
    choices = (*map(vocabulary.get, _SEPARATORS), tokenizer.bos_token_id, tokenizer.eos_token_id)
    token_id = next((choice for choice in choices if isinstance(choice, int) and choice < rows), None)
    if token_id is None:
        raise SamplingError(
            f"{key}.beginning={kind}: the tokenizer has neither a start nor an end token. Set one in it."
        )
    return [token_id]


def find_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of tokens that end a text: from the tokenizer and the generation config, separators, start."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, tokenizer.bos_token_id, *map(tokenizer.get_vocab().get, _SEPARATORS)]
    ids += listed if isinstance(listed, list) else [listed]
    return {token_id for token_id in ids if isinstance(token_id, int)}


def write_corpus(sampler: Sampler, folder: Path, work_folder: Path, header: Header) -> dict[str, Any]:
    """Sample until the documents that are kept have `generation.tokens` tokens, and write their splits into `folder`.

    Args:
        folder: must exist.
        work_folder: finished batches are saved here; a run with an equal header continues after them.

    Returns:
        The metrics of the corpus: documents and characters of each split, dropped documents by reason, tokens sampled
        and kept, and tokens a second of the batches that this run sampled.

    Raises:
        SamplingError: too much of the text is dropped.
    """
    params, judge = sampler.params, DocumentFilter()
    texts: list[str] = []
    sampled, new_tokens, seconds = 0, 0, 0.0
    for documents, duration in _read_or_sample(sampler, work_folder, header, judge):
        count = sum(map(len, documents))
        sampled += count
        new_tokens, seconds = new_tokens + (count if duration else 0), seconds + duration
        for token_ids in documents:
            if judge.kept_tokens < params.tokens and judge.accepts(token_ids):
                texts.append(_decode(token_ids, sampler.tokenizer))
        if judge.kept_tokens >= params.tokens:
            break
        if sampled >= _MOST_DROPPED * params.tokens:
            reasons = ", ".join(f"{reason} {number}" for reason, number in judge.dropped.items())
            raise SamplingError(
                f"corpora.{sampler.name}.generation: of {sampled} tokens only {judge.kept_tokens} are worth keeping "
                f"(dropped documents: {reasons}). Raise temperature or top_p, or choose another beginning."
            )
    counts: dict[str, Any] = write_splits(deal_documents("generated", list(texts)), folder)
    speed = {"tokens_per_second": round(new_tokens / seconds, 1)} if seconds else {}
    return counts | {"dropped": judge.dropped, "sampled_tokens": sampled, "tokens": judge.kept_tokens} | speed


def _read_or_sample(
    sampler: Sampler, work_folder: Path, header: Header, judge: DocumentFilter
) -> Iterator[tuple[list[list[int]], float]]:
    """Yield the documents of each batch, and the seconds that sampling took; 0 for documents of an earlier run."""
    batch = 0
    while True:
        path = work_folder / f"batch-{batch:05d}.safetensors"
        saved = load_unfinished(path, header)
        if saved is not None:
            pieces = saved["token_ids"].split(saved["lengths"].tolist())
            yield [piece.tolist() for piece in pieces], 0.0
        else:
            start = time.perf_counter()
            title = f"{sampler.name}, {judge.kept_tokens:,} of {sampler.params.tokens:,} tokens, batch {batch + 1}"
            documents = sampler.sample_batch(batch, title)
            flat = torch.tensor([token_id for document in documents for token_id in document], dtype=torch.int64)
            lengths = torch.tensor([len(document) for document in documents])
            save_tensors(path, {"token_ids": flat, "lengths": lengths}, header)
            yield documents, time.perf_counter() - start
        batch += 1


def _decode(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return cast(str, text).strip()
