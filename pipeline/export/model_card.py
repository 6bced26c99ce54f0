"""The model card of an exported folder: description, loading, quality, settings and limits of the model."""

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.blocks.quantized import BlockSettings, require_settings
from pipeline.export.source_facts import README, SourceFacts
from pipeline.models.architectures import find_max_positions
from pipeline.models.checkpoint import LM_HEAD, REPORT, Checkpoint, build_skeleton
from pipeline.models.sites import REPRESENTATIVES
from pipeline.numerics.formats import INT
from pipeline.runtime.artifacts import load_json

_VARIANTS = {"original": "original", "finetuning": "this model"}
_MEASURES = {  # key of an evaluation's metrics -> row of the quality table, decimals
    "kl": ("KL divergence from the original, nats", 4),
    "top1_agreement": ("same most likely token as the original", 3),
}

_LOADING = """\
Install the project that this folder was made with. Importing `prefixquant` registers the quantization method
`prefixquant` in transformers, which refuses this folder otherwise.

```python
import prefixquant
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/folder")
tokenizer = AutoTokenizer.from_pretrained("this/folder")
inputs = tokenizer(["Once upon a time"], return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

On the command line: `prefixquant generate this/folder "Once upon a time"` and
`prefixquant evaluate this/folder --text my.txt`. Where the project is installed next to vLLM,
`vllm serve this/folder` serves the model families that its documentation lists.\
"""


def write_model_card(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    original: Checkpoint,
    facts: SourceFacts,
    prefix: dict[str, Any],
    sizes: dict[str, Any],
    results: dict[str, Any],
    samples: dict[str, list[dict[str, Any]]],
    text_start_token_id: int | None = None,
) -> None:
    """Write README.md into `folder`.

    Args:
        checkpoint: the quantized one.
        original: the imported model.
        facts: statements of its source about license and base model.
        prefix: as in `quantization_config`.
        sizes: the stage's metrics.
        results: variant -> its evaluation's metrics. Without `original` the card has no quality table.
        samples: variant -> continuations of some prompts (`evaluation/samples.py`), `original` and `finetuning`.
        text_start_token_id: the start token between the prefix and every text, or None.
    """
    settings = require_settings(checkpoint, 0)
    start = None if text_start_token_id is None else checkpoint.tokenizer.convert_ids_to_tokens(text_start_token_id)
    name = facts.base_model.rsplit("/", 1)[-1] if isinstance(facts.base_model, str) else checkpoint.config.model_type
    sections = {
        "": _describe_model(original, prefix, sizes),
        "How to load it": _LOADING,
        "How texts are read": _describe_use(prefix, start),
        "Quality": _describe_quality(results) if "original" in results else "",
        "Samples": _describe_samples(samples),
        "Settings": _describe_settings(checkpoint, settings, prefix),
        "Limits": _describe_limits(checkpoint, prefix, start, results),
    }
    lines = ["---", _format_front_matter(facts), "---", f"# {name}, {describe_bits(settings)}"]
    for title, text in sections.items():
        if text:
            lines += ["", *([f"## {title}", ""] if title else []), text]
    (folder / README).write_text("\n".join(lines) + "\n", encoding="utf-8")


def describe_bits(settings: BlockSettings) -> str:
    """Return the bits of a block's settings in the field's short form: `W4A4KV4 static`."""
    weights, activations, keys, _ = (settings.spec(site) for site in REPRESENTATIVES.values())
    mode = "" if not activations.enabled else " dynamic" if activations.dynamic else " static"
    return f"W{weights.bits}A{activations.bits}KV{keys.bits}{mode}"


def _format_front_matter(facts: SourceFacts) -> str:
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", **facts.license}
    if facts.base_model is not None:
        values["base_model"] = facts.base_model
    if facts.is_quantized_from:
        values["base_model_relation"] = "quantized"
    values["tags"] = ["prefixquant", "quantized"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()


def _describe_model(original: Checkpoint, prefix: dict[str, Any], sizes: dict[str, Any]) -> str:
    config = original.config
    parameters = sum(weight.numel() for weight in build_skeleton(config).parameters())  # a tied table counts once
    method = (
        " A few tokens carry massive activations. PrefixQuant places them once, in full precision, as a prefix before "
        "every text, so that all other activations fit into coarse quantization ranges."
    )
    return (
        f"A language model of the family `{config.model_type}` with {original.block_count} blocks, hidden size "
        f"{config.hidden_size} and {parameters:,} parameters, quantized by PrefixQuant (arXiv:2410.05265)."
        f"{method if prefix['tokens'] else ''}{describe_source(original)}\n\n"
        f"Weights take {sizes['size_mib']} MiB, the original's {sizes['original_mib']} MiB."
    )


def describe_source(original: Checkpoint) -> str:
    """Return sentences on changes at import: another family, dropped parts, weights that were stored quantized."""
    if not (original.folder / REPORT).is_file():
        return ""
    report, text = load_json(original.folder / REPORT, original.stage), ""
    if report.get("wrapper"):
        text += f" It is the text model of a `{report['wrapper']}` checkpoint and reads no images."
    if report.get("rewritten"):
        changes = "; ".join(report["rewritten"]["changes"])
        text += f" The source is of the family `{report['rewritten']['from']}`, rewritten without change of output: "
        text += f"{changes}."
    if report.get("dropped"):
        parts = ", ".join(f"{part} ({dropped['tensors']} tensors)" for part, dropped in report["dropped"].items())
        text += f" Dropped from the source: {parts}."
    if report.get("quantization"):
        text += f" The source stored its weights quantized: {report['quantization']['format']}."
    return text


def _describe_use(prefix: dict[str, Any], start: str | None) -> str:
    use = "The prefix is part of the model. Pass texts without it; positions and masks do not count it."
    if not prefix["tokens"]:
        use = "This model has no prefix. It reads texts as the original model does."
    if start is not None:
        return f"{use} A text begins with the start token `{start}`, which this folder's tokenizer adds."
    if prefix["start_token_id"] is None:
        return use
    return (
        f"{use} The prefix ends in the start token, so a text must not begin with a second one. This folder's "
        "tokenizer adds none."
    )


def _describe_quality(results: dict[str, Any]) -> str:
    exact, variants = results["original"], list(results.values())
    rows = []
    for corpus, base in exact["perplexity"].items():
        values = [metrics["perplexity"][corpus] for metrics in variants]
        errors = [metrics.get("standard_error", {}).get(corpus) for metrics in variants]
        spreads = ["" if error is None else f" ± {error:.2f}" for error in errors]
        cells = [f"{value:.2f}{spread}" for value, spread in zip(values, spreads, strict=True)]
        rows.append([f"{corpus}, perplexity", *cells])
        if len(variants) > 1:
            rows.append([f"{corpus}, perplexity ratio", *(f"{value / base:.3f}" for value in values)])
        for key, (title, decimals) in _MEASURES.items():
            compared = [metrics.get(key, {}).get(corpus) for metrics in variants]
            if any(value is not None for value in compared):
                cells = ["" if value is None else f"{value:.{decimals}f}" for value in compared]
                rows.append([f"{corpus}, {title}", *cells])
    for task, scores in exact.get("tasks", {}).items():
        if "acc" in scores:
            rows.append([f"{task}, acc", *(f"{metrics['tasks'][task]['acc']:.3f}" for metrics in variants)])
    head = ["", *(_VARIANTS.get(variant, variant) for variant in results)]
    lines = [_format_row(head), "| --- |" + " ---: |" * len(results), *map(_format_row, rows)]
    note = f"Perplexity is measured on held-out windows ({_count_windows(exact)}). `±` is one standard error."
    return "\n".join([*lines, "", note])


def _describe_samples(samples: dict[str, list[dict[str, Any]]]) -> str:
    """Return the continuations of each prompt by the original and by this model, as code blocks."""
    parts = []
    for rows in zip(*samples.values(), strict=True):
        for variant, row in zip(samples, rows, strict=True):
            text = row["prompt"] + "".join(row["pieces"])
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            parts.append(f"{_VARIANTS.get(variant, variant)}:\n\n{fence}text\n{text}\n{fence}")
    note = "Prompts with their greedy continuations, by the original and by this model."
    return "\n\n".join([note, *parts]) if parts else ""


def _count_windows(metrics: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} of {corpus}" for corpus, count in metrics["settings"]["windows"].items())
    return f"{counts}, with {metrics['settings']['targets_per_window']} targets each"


def _describe_settings(checkpoint: Checkpoint, settings: BlockSettings, prefix: dict[str, Any]) -> str:
    lines = ["| | bits | symmetric | group size | range |", "| --- | ---: | --- | ---: | --- |"]
    for title, site in REPRESENTATIVES.items():
        spec = settings.spec(site)
        if not spec.enabled:
            lines.append(f"| {title} | 16 | | | |")
            continue
        size = "all" if spec.group_size == -1 else spec.group_size
        bits = spec.bits if spec.format == INT else f"{spec.bits} ({spec.format})"
        cells = [title, bits, "yes" if spec.symmetric else "no", size, "dynamic" if spec.dynamic else "static"]
        lines.append(_format_row(cells))
    if LM_HEAD in checkpoint.settings:
        lines.append(_format_row(["lm_head and its input", checkpoint.settings[LM_HEAD]["bits"], "yes", "all", ""]))
    texts = [repr(checkpoint.tokenizer.decode([token])) for token in prefix["token_ids"]]
    continuous = f"{prefix['tokens']} continuous embeddings" if prefix["tokens"] else "none"
    online = {name: getattr(settings, f"online_{name.lower()}") for name in ("R1", "R3", "R4", "R5")}
    rotations = [name for name, is_online in online.items() if is_online]
    return "\n".join(
        [
            *lines,
            "",
            f"Prefix: {', '.join(texts) or continuous}. Online rotations: {', '.join(rotations) or 'none'}. "
            "The table shows the first block. Settings of every site of every block: `quantization_config` in "
            "`config.json`.",
        ]
    )


def _describe_limits(checkpoint: Checkpoint, prefix: dict[str, Any], start: str | None, results: dict[str, Any]) -> str:
    before = prefix["tokens"] + (start is not None)
    longest = find_max_positions(checkpoint.config) - before
    limits = [
        "It keeps the limits, biases and terms of use of the original model, and quantization adds errors of its own.",
        f"A text and its continuation may have at most {longest} tokens"
        + (f": {before} of the model's positions are used before it." if before else "."),
        "transformers' continuous batching (`generate_batch`) is refused. Use `generate` with a padded batch.",
    ]
    if "original" in results:
        length = results["original"]["settings"]["targets_per_window"] + 1
        limits.insert(1, f"Quality was measured on windows of {length} tokens. Longer texts were not measured.")
    else:
        limits.insert(1, "Quality was not measured.")
    return "\n".join(f"- {limit}" for limit in limits)


def _format_row(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
