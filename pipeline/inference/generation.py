"""Generate text from an exported folder, printed as it is made.

    prefixquant generate artifacts/export "Once upon a time" --max-new-tokens 64
    prefixquant chat artifacts/export

On a CPU integers are multiplied as integers. `--arithmetic float` is slower and computes exactly the numbers that the
pipeline evaluated.
"""

import argparse
import logging
from pathlib import Path
from typing import Any, cast

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from pipeline.inference.loading import check_generation_config, load
from pipeline.inference.text_interface import TextInterface, describe_interface, read_interface
from pipeline.models.layers import Generates
from pipeline.runtime.arguments import ArgumentError, Parser, device, non_negative, text, whole
from pipeline.runtime.errors import reading
from pipeline.runtime.progress import return_freed_memory

_CHAT = """Talk to an exported model, by its chat template. An empty line ends the conversation.

    prefixquant chat artifacts/export
"""
_COLDEST = 1e-6  # logits divided by a lower temperature overflow


def main(*, takes_turns: bool = False) -> None:
    """Run `prefixquant generate`, or `prefixquant chat` if `takes_turns`, with the arguments of the command line."""
    parser = Parser(description=_CHAT if takes_turns else __doc__)
    parser.add_argument("folder", type=Path, help="an exported model")
    parser.add_argument("prompt", nargs="?", type=text, help="text to continue; read from the terminal if left out")
    turns = argparse.SUPPRESS if takes_turns else "take turns, by the model's chat template"
    parser.add_argument("--chat", action="store_true", default=takes_turns, help=turns)
    parser.add_argument("--max-new-tokens", type=whole(1), default=64)
    parser.add_argument("--temperature", type=non_negative, default=0.0, help="0 takes the most likely token (default)")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--arithmetic", choices=("float", "integer"), help="default: integer on a CPU, float elsewhere")
    arguments = parser.parse_args()
    return_freed_memory()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(arguments.seed)
    interface = read_interface(arguments.folder)
    check_generation_config(arguments.folder)
    if arguments.chat and interface.tokenizer.chat_template is None:
        name, remedy = ("chat", "Use prefixquant generate.") if takes_turns else ("--chat", "Leave it out.")
        raise ArgumentError(f"{name}: this model's tokenizer has no chat template. {remedy}")
    prompt = _read(arguments.prompt)
    if arguments.chat and not prompt:
        return
    first_turn = [{"role": "user", "content": prompt}]
    token_ids = (
        render_turns(first_turn, interface.tokenizer) if arguments.chat else interface.tokenizer(prompt)["input_ids"]
    )
    check_prompt(token_ids, interface, arguments.max_new_tokens)
    arithmetic = arguments.arithmetic or ("integer" if arguments.device.type == "cpu" else "float")
    model, tokenizer = load(arguments.folder, arguments.device, arithmetic)
    options: dict[str, Any] = {
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": arguments.temperature > _COLDEST,
    }
    if arguments.temperature > _COLDEST:
        options["temperature"] = arguments.temperature
    if arguments.chat:
        chat(model, tokenizer, prompt, options)
    else:
        stream_text(model, tokenizer, token_ids, options)


def check_prompt(token_ids: list[int], interface: TextInterface, max_new_tokens: int) -> list[int]:
    """Return the token ids of a prompt without a start token that the prefix has already.

    Raises:
        ArgumentError: there is no text, or more than the model has positions for.
    """
    if interface.start_token_id is not None and token_ids[:1] == [interface.start_token_id]:
        token_ids = token_ids[1:]
    if not token_ids:
        raise ArgumentError("the prompt is empty. Give some text to continue.")
    prefix, limit = interface.prefix_tokens, interface.max_positions
    if prefix + len(token_ids) + max_new_tokens > limit:
        raise ArgumentError(
            f"{prefix} tokens of prefix, {len(token_ids)} of text and {max_new_tokens} new ones exceed the {limit} "
            "positions of this model. Shorten the text, or lower --max-new-tokens."
        )
    return token_ids


def render_turns(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a chat up to the model's next turn. Raise ArgumentError if the template refuses them."""
    with reading(lambda why: ArgumentError(f"--chat: the model's chat template refuses the conversation ({why}).")):
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    assert isinstance(encoded, BatchEncoding), "return_dict=True returns all fields"
    return encoded["input_ids"]


def stream_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_ids: list[int], options: dict[str, Any]
) -> str:
    """Print the continuation of `token_ids` while it is generated, and return it.

    A start token that the prefix has already is left out.

    Raises:
        ArgumentError: there is no text, or more than the model has positions for, or transformers refuses the settings
            of the generation config.
    """
    token_ids = check_prompt(token_ids, describe_interface(model, tokenizer), options["max_new_tokens"])
    inputs = torch.tensor([token_ids], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    mask = torch.ones_like(inputs)
    refused = "transformers refuses the settings of the folder's generation_config.json"
    with reading(lambda why: ArgumentError(f"{refused} ({why}). Correct or remove them."), "transformers.generation"):
        output = cast(Generates, model).generate(
            inputs, attention_mask=mask, pad_token_id=pad, streamer=streamer, **options
        )
    assert isinstance(output, torch.Tensor), "generate returns ids unless it is asked for more"
    text = tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str), "one text was decoded"
    return text


def chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | None, options: dict[str, Any]
) -> None:
    """Take turns until the input ends or is empty."""
    turns: list[dict[str, str]] = []
    while prompt := _read(prompt):
        turns.append({"role": "user", "content": prompt})
        token_ids = render_turns(turns, tokenizer)
        turns.append({"role": "assistant", "content": stream_text(model, tokenizer, token_ids, options)})
        prompt = None


def _read(prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    try:
        return input("> ")
    except EOFError:
        return ""
    except UnicodeDecodeError:
        raise ArgumentError("the typed text is not encoded in UTF-8. Type it in UTF-8.") from None
