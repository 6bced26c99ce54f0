import torch

class SamplingParams:
    max_tokens: int | None
    prompt_logprob_token_ids: object | None

class EngineCoreRequest:
    prompt_token_ids: list[int] | None
    prompt_embeds: torch.Tensor | None
    resumable: bool
    sampling_params: SamplingParams | None
