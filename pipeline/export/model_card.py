"""The model card of an exported folder: what it is, how well it does, how to load it."""

from pathlib import Path
from typing import Any

from pipeline.blocks.quantized import BlockSettings, block_settings
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import REPRESENTATIVES

CARD = "README.md"


def write_model_card(
    folder: Path,
    checkpoint: Checkpoint,
    prefix: dict[str, Any],
    sizes: dict[str, Any],
    results: dict[str, Any],
    start_token: int | None = None,
) -> None:
    """Write README.md into `folder`.

    Args:
        prefix: as in `quantization_config`.
        sizes: the stage's metrics.
        results: variant -> its evaluation's metrics; `original` among them.
        start_token: that belongs in front of every text, or None.
    """
    start = None if start_token is None else checkpoint.tokenizer.convert_ids_to_tokens(start_token)
    settings = block_settings(checkpoint, 0)
    tokens = [repr(checkpoint.tokenizer.decode([token])) for token in prefix["token_ids"]]
    described = ", ".join(tokens) if tokens else f"{prefix['tokens']} continuous embeddings"
    online = {name: getattr(settings, f"online_{name.lower()}") for name in ("R1", "R3", "R4", "R5")}
    rotations = [name for name, on in online.items() if on]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [prefixquant, quantized]",
        "---",
        f"# {describe_bits(settings)}, quantized with a prefix",
        "",
        f"A {checkpoint.config.model_type} model of {checkpoint.block_count} blocks, quantized by PrefixQuant "
        "(arXiv:2410.05265): a prefix in full precision stands in front of whatever it reads, and takes the outliers "
        "with it.",
        "",
        "## Load it",
        "",
        "```python",
        "import pipeline.hf  # of the project this was made with: adds quant_method prefixquant to transformers",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
        'inputs = tokenizer(["Once upon a time"], return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
        "```",
        "",
        _describe_use(prefix, start),
        "",
        "## Settings",
        "",
        "| | bits | symmetric | group size | range |",
        "| --- | ---: | --- | ---: | --- |",
    ]
    for title, site in REPRESENTATIVES.items():
        spec = settings.spec(site)
        if not spec.enabled:
            lines.append(f"| {title} | 16 | | | |")
            continue
        kind = "dynamic" if spec.dynamic else "static"
        size = "all" if spec.group_size == -1 else spec.group_size
        lines.append(f"| {title} | {spec.bits} | {'yes' if spec.symmetric else 'no'} | {size} | {kind} |")
    lines += [
        "",
        f"Prefix: {described if prefix['tokens'] else 'none'}. Online rotations: {', '.join(rotations) or 'none'}. "
        "Settings of every site of every block: `quantization_config` in `config.json`.",
        "",
        f"Weights take {sizes['size_mib']} MiB, the original's {sizes['original_mib']} MiB.",
    ]
    if "original" in results:
        lines += ["", "## Results", "", *_describe_results(results)]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def describe_bits(settings: BlockSettings) -> str:
    """W4A4KV4 static."""
    weights, activations, keys, _ = (settings.spec(site) for site in REPRESENTATIVES.values())
    mode = "" if not activations.enabled else " dynamic" if activations.dynamic else " static"
    return f"W{weights.bits}A{activations.bits}KV{keys.bits}{mode}"


def _describe_use(prefix: dict[str, Any], start: str | None) -> str:
    use = "The prefix is part of the model: nothing of it is passed, no position or mask counts it."
    if not prefix["tokens"]:
        use = "There is no prefix: texts are read as the original model reads them."
    if start is not None:
        return f"{use} A text begins with the start token `{start}`, which the tokenizer here puts there."
    if prefix["start_token_id"] is None:
        return use
    return f"{use} Put no start token in front of a text; the prefix takes its place, and the tokenizer here adds none."


def _describe_results(results: dict[str, Any]) -> list[str]:
    exact = results["original"]
    corpora = list(exact["perplexity"])
    tasks = [name for name, scores in exact.get("tasks", {}).items() if "acc" in scores]
    columns = [f"perplexity, {corpus}" for corpus in corpora] + [f"{task}, acc" for task in tasks]
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for variant, metrics in results.items():
        cells = [f"{metrics['perplexity'][corpus]:.2f}" for corpus in corpora]
        cells += [f"{metrics['tasks'][task]['acc']:.3f}" for task in tasks]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    windows = ", ".join(f"{count} of {corpus}" for corpus, count in exact["settings"]["windows"].items())
    return [*lines, "", f"Held-out windows ({windows}) with {exact['settings']['targets_per_window']} targets each."]
