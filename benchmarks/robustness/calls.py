"""Calls of an exported model in ways that share, copy, cut or interleave its cache, and the same texts read alone.

In float64 every way is compared with one call for each text, because there rounding changes no quantized value. In
other dtypes, ways that call the model with the same pieces of text must give the same bits.
"""

import copy
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.robustness.bases import Bases
from benchmarks.robustness.trial import Trial
from pipeline.inference.loading import load
from pipeline.runtime.errors import PipelineError

TOLERANCE = 1e-6  # of the largest logit, in float64
Pieces = list[torch.Tensor]
Texts = list[torch.Tensor]


def call_export(rng: random.Random, bases: Bases, folder: Path) -> Trial:
    """Call an exported model in one of the `WAYS`, after a cast to one of the dtypes."""
    export = bases.find("export")
    way = rng.choice(sorted(WAYS))
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16] if way in SAME_PIECES else [torch.float64])
    texts = [
        torch.tensor([[rng.randrange(2, 300) for _ in range(rng.randrange(2, 40))]]) for _ in range(rng.randrange(1, 4))
    ]
    seed, results = rng.random(), []
    every = _list_pieces(random.Random(seed), texts)

    def act() -> None:
        model = load(export)[0].to(dtype)
        with torch.no_grad():
            results.extend(WAYS[way](random.Random(seed), model, texts))

    def judge() -> str | None:
        alone = load(export)[0].to(dtype)
        for number, (text, logits) in enumerate(zip(texts, results, strict=True)):
            with torch.no_grad():
                expected = alone(text, use_cache=False).logits
                pieces = _read(alone, every[number], alone.make_cache())
            if way in SAME_PIECES and not torch.equal(logits, pieces):
                return f"text {number}: other bits than by undisturbed calls with the same pieces"
            off = ((logits - expected).abs().max() / expected.abs().max()).item()
            if dtype == torch.float64 and not off <= TOLERANCE:
                return f"text {number}: logits are off by {off:.2g}"
        return None

    shapes = [[piece.shape[1] for piece in pieces] for pieces in every]
    what = f"{way}, {str(dtype).removeprefix('torch.')}, texts of {shapes}"
    return Trial(what, act, judge, unchanged=export)


def _cut(rng: random.Random, text: torch.Tensor) -> Pieces:
    """Return a text in one to four pieces."""
    length = text.shape[1]
    places = sorted(rng.sample(range(1, length), min(rng.randrange(4), length - 1)))
    return list(text.tensor_split(places, dim=1))


def _list_pieces(rng: random.Random, texts: Texts) -> list[Pieces]:
    """Return the pieces of each text: the first that a way draws, so that the judge draws the same."""
    seed = rng.random()
    return [_cut(random.Random(f"{seed}/{number}"), text) for number, text in enumerate(texts)]


def _read(model: Any, pieces: Pieces, cache: Any) -> torch.Tensor:
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


def read_in_pieces(rng: random.Random, model: Any, texts: Texts) -> Iterator[torch.Tensor]:
    """Read one text after the other."""
    for pieces in _list_pieces(rng, texts):
        yield _read(model, pieces, model.make_cache())


def read_with(transform: Callable[[Any], Any]) -> Callable[..., Iterator[torch.Tensor]]:
    """Return a way that replaces the cache between two pieces; the first cache reads something else meanwhile."""

    def read(rng: random.Random, model: Any, texts: Texts) -> Iterator[torch.Tensor]:
        for pieces in _list_pieces(rng, texts):
            cache, logits = model.make_cache(), []
            for piece in pieces:
                logits.append(model(piece, past_key_values=cache).logits)
                left, cache = cache, transform(cache)
                model(torch.tensor([[5, 6, 7]]), past_key_values=left)
            yield torch.cat(logits, dim=1)

    return read


def read_interleaved(rng: random.Random, model: Any, texts: Texts) -> Iterator[torch.Tensor]:
    """Read a piece of each text in turn."""
    every = _list_pieces(rng, texts)
    caches, logits = [model.make_cache() for _ in texts], [[] for _ in texts]
    for turn in range(max(map(len, every))):
        for pieces, cache, parts in zip(every, caches, logits, strict=True):
            if turn < len(pieces):
                parts.append(model(pieces[turn], past_key_values=cache).logits)
    return (torch.cat(parts, dim=1) for parts in logits)


def read_in_threads(rng: random.Random, model: Any, texts: Texts) -> Iterator[torch.Tensor]:
    """Read each text in a thread of its own."""
    logits: dict[int, torch.Tensor] = {}

    def read(number: int, pieces: Pieces) -> None:
        with torch.no_grad():
            logits[number] = _read(model, pieces, model.make_cache())

    threads = [threading.Thread(target=read, args=pair) for pair in enumerate(_list_pieces(rng, texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (logits[number] for number in range(len(texts)))


def read_cropped(rng: random.Random, model: Any, texts: Texts) -> Iterator[torch.Tensor]:
    """Read too much, take it back, and go on."""
    for pieces in _list_pieces(rng, texts):
        cache, logits = model.make_cache(), []
        for piece in pieces:
            logits.append(model(piece, past_key_values=cache).logits)
            more = torch.randint(2, 300, (1, rng.randrange(1, 5)), generator=torch.Generator().manual_seed(0))
            model(more, past_key_values=cache)
            cache.crop(-more.shape[1])
        yield torch.cat(logits, dim=1)


def read_padded(rng: random.Random, model: Any, texts: Texts) -> Iterator[torch.Tensor]:
    """Read all texts in one batch, padded on the left or on the right."""
    width, left = max(text.shape[1] for text in texts), rng.random() < 0.5
    token_ids, mask = torch.zeros(2, len(texts), width, dtype=torch.int64)
    places = [slice(width - text.shape[1], width) if left else slice(text.shape[1]) for text in texts]
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        token_ids[row, place], mask[row, place] = text[0], 1
    logits = model(token_ids, attention_mask=mask).logits
    return (logits[row : row + 1, place] for row, place in enumerate(places))


def read_packed(rng: random.Random, model: Any, texts: Texts) -> Iterator[torch.Tensor]:
    """Read all texts in one row, with positions that restart. The call with a cache is refused."""
    lengths = [text.shape[1] for text in texts]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    try:
        logits = model(torch.cat(texts, dim=1), position_ids=positions, use_cache=rng.random() < 0.5).logits
    except ValueError as error:
        if str(error).startswith("position_ids restart"):
            raise PipelineError(str(error)) from None  # a refusal in words
        raise
    return iter(logits.split(lengths, dim=1))


def read_with_positions(rng: random.Random, model: Any, texts: Texts) -> Iterator[torch.Tensor]:
    """Pass positions, a mask or embeddings, or ask for a tuple."""
    for text in texts:
        positions, mask = torch.arange(text.shape[1]).unsqueeze(0), torch.ones_like(text)
        yield rng.choice(
            [
                lambda text=text, positions=positions: model(text, position_ids=positions).logits,
                lambda text=text, mask=mask: model(text, attention_mask=mask).logits,
                lambda text=text: model(inputs_embeds=model.get_input_embeddings()(text)).logits,
                lambda text=text: model(text, return_dict=False, use_cache=False)[0],
            ]
        )()


SAME_PIECES: dict[str, Callable[[random.Random, Any, Texts], Iterator[torch.Tensor]]] = {
    "in pieces": read_in_pieces,
    "copied caches": read_with(copy.deepcopy),
    "pickled caches": read_with(lambda cache: pickle.loads(pickle.dumps(cache))),
    "interleaved": read_interleaved,
    "threads": read_in_threads,
    "cropped": read_cropped,
}
WAYS = SAME_PIECES | {"padded": read_padded, "packed": read_packed, "other arguments": read_with_positions}
