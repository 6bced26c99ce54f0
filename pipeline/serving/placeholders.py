"""Every text gets P placeholders in front, and loses the start token that the prefix has already.

One place sees all of an engine's requests, however they come (completions, chat, token ids, `LLM(...)`, a server, alone
or in batches): vLLM's input processor, which makes of each what the engine gets. What it makes is changed here, once,
behind all that reads texts; the engine itself (scheduler, cached prefixes, chunks) sees longer texts and nothing else.

A placeholder's id means nothing, as its place in the cache is the prefix's. It is one that no text wants to have made
more or less likely by penalties on what the prompt holds.
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
    """A request that cannot have the prefix in front; a server answers "bad request" (400)."""


def insert_placeholders_() -> None:
    """Change vLLM's input processor; a second call changes nothing."""
    process = InputProcessor.process_inputs
    if hasattr(process, "prefixquant"):
        return

    @functools.wraps(process)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> EngineCoreRequest:
        request = process(self, *args, **kwargs)
        config = self.vllm_config.model_config
        if config.quantization == METHOD:
            put_in_front_(request, self.vllm_config)
        return request

    process_inputs.prefixquant = True
    InputProcessor.process_inputs = process_inputs


def put_in_front_(request: EngineCoreRequest, config: VllmConfig) -> None:
    """P placeholders in front of a request's text.

    Raises:
        RefusedRequestError: a request that cannot have them; it names what stands in the way.
    """
    model = config.model_config
    prefix, limit = model.hf_config.quantization_config["prefix"], model.max_model_len
    tokens = prefix["tokens"]
    if not tokens:
        return
    if request.prompt_embeds is not None:
        raise RefusedRequestError("prompt_embeds: a prefix stands in front of token ids only; send token ids")
    if request.resumable:
        raise RefusedRequestError("streamed input: every piece would get the prefix in front; send the text at once")
    params = request.sampling_params
    if params is not None and params.prompt_logprob_token_ids is not None:
        raise RefusedRequestError("prompt_logprob_token_ids: rows do not count placeholders; ask for prompt_logprobs")
    text = list(request.prompt_token_ids)
    # A model whose texts begin with a start token of their own keeps it: `start_token_id` is null then.
    if prefix["start_token_id"] is not None and text[:1] == [prefix["start_token_id"]]:
        text = text[1:]
    if not text:
        raise RefusedRequestError("the prompt is empty behind the start token, which the prefix has already")
    if tokens + len(text) >= limit:
        raise RefusedRequestError(
            f"the prompt has {len(text)} tokens, and {tokens} of max_model_len={limit} are the prefix's; send at most "
            f"{limit - tokens - 1}"
        )
    request.prompt_token_ids = [choose_placeholder(model.hf_config)] * tokens + text
    if params is not None and params.max_tokens is not None:
        params.max_tokens = min(params.max_tokens, limit - tokens - len(text))


def choose_placeholder(config: Any) -> int:
    """BOS, or the vocabulary's last id where there is none or it also ends texts."""
    own, end = config.bos_token_id, config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    return config.vocab_size - 1 if own is None or own in ends else own
