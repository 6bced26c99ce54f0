"""Every text gets P placeholders before it, and loses a start token that the prefix has.

All requests of an engine pass through one place: vLLM's input processor, whether they are completions, chats, token
ids, calls of `LLM(...)` or of a server. Its result is changed here, once, after everything that reads texts. The rest
of the engine (scheduler, cached prefixes, chunks) only receives longer texts.

The id of a placeholder has no meaning, because the prefix takes its place in the cache. It is an id that texts do not
need, so that penalties on tokens of the prompt have no effect.
"""

import functools
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMClientError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from pipeline.inference.transformers_quantizer import METHOD
from pipeline.serving.families import ServingError


class RefusedRequestError(ServingError, VLLMClientError):
    """A request cannot get the prefix; a server answers "bad request" (400)."""


def insert_placeholders_() -> None:
    """Wrap vLLM's input processor. A second call changes nothing."""
    process = InputProcessor.process_inputs
    if hasattr(process, "prefixquant"):
        return

    @functools.wraps(process)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> EngineCoreRequest:
        request = process(self, *args, **kwargs)
        config = self.vllm_config.model_config
        if config.quantization == METHOD:
            prepend_placeholders_(request, self.vllm_config)
        return request

    process_inputs.__dict__["prefixquant"] = True
    InputProcessor.process_inputs = process_inputs


def prepend_placeholders_(request: EngineCoreRequest, config: VllmConfig) -> None:
    """Put P placeholders before a request's text.

    Raises:
        RefusedRequestError: the request cannot get them; the message names the reason.
    """
    model = config.model_config
    prefix, limit = model.hf_config.quantization_config["prefix"], model.max_model_len
    tokens = prefix["tokens"]
    if not tokens:
        return
    if request.prompt_embeds is not None:
        raise RefusedRequestError("prompt_embeds: the prefix can only come before token ids. Send token ids.")
    if request.resumable:
        raise RefusedRequestError("streamed input: every piece would get a prefix. Send the text at once.")
    params = request.sampling_params
    if params is not None and params.prompt_logprob_token_ids is not None:
        raise RefusedRequestError("prompt_logprob_token_ids: its rows do not count placeholders. Use prompt_logprobs.")
    text = list(request.prompt_token_ids or ())
    # Where texts begin with a start token of their own, `start_token_id` is null, and they keep it.
    if prefix["start_token_id"] is not None and text[:1] == [prefix["start_token_id"]]:
        text = text[1:]
    if not text:
        raise RefusedRequestError("the prompt is empty, or only the start token, which the prefix has. Send some text.")
    if tokens + len(text) >= limit:
        raise RefusedRequestError(
            f"the prompt has {len(text)} tokens, and {tokens} of max_model_len={limit} are the prefix's. Send at most "
            f"{limit - tokens - 1}."
        )
    request.prompt_token_ids = [choose_placeholder(model.hf_config)] * tokens + text
    if params is not None and params.max_tokens is not None:
        params.max_tokens = min(params.max_tokens, limit - tokens - len(text))


def choose_placeholder(config: Any) -> int:
    """Return the start token, or the last id of the vocabulary if there is none, or if it also ends texts."""
    start, end = config.bos_token_id, config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    return config.vocab_size - 1 if start is None or start in ends else start
