"""Text from an exported folder, as it is made.

    python -m pipeline.generate artifacts/export "Once upon a time" --max-new-tokens 64
    python -m pipeline.generate artifacts/export --chat

On a CPU integers are multiplied as such (`--arithmetic float` computes what the pipeline evaluated, slower).
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from pipeline.export.loading import load
from pipeline.export.prefixed_model import strip_start_token
from pipeline.runtime.progress import return_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an exported model")
    parser.add_argument("prompt", nargs="?", help="text to go on from; read from the terminal when left out")
    parser.add_argument("--chat", action="store_true", help="take turns, with the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arithmetic", choices=("float", "integer"), help="default: integer on a CPU, float elsewhere")
    arguments = parser.parse_args()
    return_freed_memory()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(arguments.seed)
    arithmetic = arguments.arithmetic or ("integer" if arguments.device == "cpu" else "float")
    model, tokenizer = load(arguments.folder, arguments.device, arithmetic)
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if arguments.temperature > 0:
        options["temperature"] = arguments.temperature
    if arguments.chat:
        chat(model, tokenizer, arguments.prompt, options)
    else:
        prompt = arguments.prompt if arguments.prompt is not None else input("> ")
        stream_text(model, tokenizer, tokenizer(prompt)["input_ids"], options)


def stream_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_ids: list[int], options: dict[str, Any]
) -> str:
    """Print what follows `token_ids` while it is generated, and return it. A start token the prefix has is left out."""
    inputs = torch.tensor([strip_start_token(token_ids, model)], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    mask = torch.ones_like(inputs)
    output = model.generate(inputs, attention_mask=mask, pad_token_id=pad, streamer=streamer, **options)
    return tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)


def chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | None, options: dict[str, Any]
) -> None:
    """Take turns until the input ends or is empty."""
    turns: list[dict[str, str]] = []
    while prompt := _read(prompt):
        turns.append({"role": "user", "content": prompt})
        token_ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        turns.append({"role": "assistant", "content": stream_text(model, tokenizer, token_ids, options)})
        prompt = None


def _read(prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    try:
        return input("> ")
    except EOFError:
        return ""
