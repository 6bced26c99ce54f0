"""vLLM against transformers on one exported folder: log-probabilities, greedy continuations, perplexity.

    W=artifacts/calibration/evaluation
    python -m benchmarks.serving.parity artifacts/export --windows $W/*.safetensors --perplexity 4

Run it where vLLM is installed (`make serve-setup`; docs/serving.md). Both engines read the same 8 texts of different
lengths, vLLM all at once, transformers one by one (`pipeline.quantized_model.load`), and continue them greedily. Where
a continuation differs, the figure to look at is the distance of the two tokens in transformers: is it a tie?

Both multiply integers by kernels of their own, if the settings allow it. `--arithmetic float` compares with the
arithmetic of `evaluation`.

Quantizers amplify rounding. A value on the edge between two integers falls to either side with the last bit of a sum,
and after 30 blocks of 4 bits a perturbation of 1e-6 is as large as the quantization error itself. The output therefore
also has

    noise               the change of log-probabilities in transformers if its embeddings are disturbed by 1e-6
    noise_equal         the number of continued texts in which this disturbance changes no choice
    median_block        the relative difference of a token's output, if every block of transformers reads vLLM's input
    rounded_otherwise   the fraction of these outputs that differ by more than 1e-4

The last two need --eager and one process, because the values between compiled blocks cannot be read.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.inference.loading import Arithmetic, load
from pipeline.inference.prefixed_model import strip_start_token
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.errors import run_main
from pipeline.text.windows import load_windows

LENGTHS = (5, 17, 40, 64, 100, 163, 256, 400)
CONTINUED, NEW_TOKENS = 20, 64


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="an exported model")
    parser.add_argument(
        "--windows", type=Path, nargs="*", default=[], help="files of held-out token windows; default: random tokens"
    )
    parser.add_argument(
        "--perplexity", type=whole(0), default=0, metavar="N", help="of N windows of each file, in both"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--chunk", type=whole(1), default=96, help="tokens that vLLM reads at a time: texts come in chunks"
    )
    parser.add_argument("--max-model-len", type=whole(1), help="default: the model's")
    parser.add_argument(
        "--arithmetic",
        choices=("integer", "float"),
        default="integer",
        help="of transformers: integers as vLLM multiplies them, or floats as `evaluation` does (default: integer)",
    )
    parser.add_argument("--processes", type=whole(1), default=1, help="of vLLM: its tensor_parallel_size (default: 1)")
    parser.add_argument(
        "--packed-cache", action="store_true", help="vLLM's cache holds codes (docs/serving.md#a-cache-of-codes)"
    )
    parser.add_argument("--eager", action="store_true", help="without compiling: starts in seconds, not minutes")
    arguments = parser.parse_args()
    if arguments.perplexity and not arguments.windows:
        parser.error("--perplexity needs --windows")
    print(json.dumps(compare(**vars(arguments))))


def compare(
    folder: Path,
    *,
    windows: Sequence[Path] = (),
    perplexity: int = 0,
    dtype: str = "float32",
    chunk: int = 96,
    max_model_len: int | None = None,
    eager: bool = False,
    processes: int = 1,
    packed_cache: bool = False,
    arithmetic: Arithmetic = "integer",
) -> dict[str, Any]:
    """Return the figures that `main` prints. `chunk`: number of tokens that vLLM reads at a time."""
    set_up_vllm()
    from vllm import LLM, SamplingParams

    model, _ = load(folder, arithmetic=arithmetic)
    llm = LLM(
        str(folder),
        dtype=dtype,
        max_num_batched_tokens=chunk,
        max_num_seqs=16,
        max_model_len=max_model_len,
        enable_prefix_caching=True,
        enforce_eager=eager,
        tensor_parallel_size=processes,
        additional_config={"packed_cache": packed_cache},
    )
    tokens = cut_texts(model, windows, max_model_len)
    values: dict[str, Any] = {"folder": folder.name, "dtype": dtype, "arithmetic": arithmetic}
    differences = []
    for _ in range(2):  # the second time from cached prefixes, where prompt_logprobs allow it
        for text, served in zip(tokens, score_served(llm, tokens), strict=True):
            differences.append((served - score(model, text)).abs())
    noise = torch.cat([(score(model, text, 1e-6) - score(model, text)).abs() for text in tokens])
    values["noise"] = noise.mean().item()
    values["median_difference"] = torch.cat(differences).median().item()
    values["mean_difference"] = torch.cat(differences).mean().item()
    values["largest_difference"] = torch.cat(differences).max().item()
    if eager and processes == 1 and any(len(text) <= chunk - 16 for text in tokens):
        off = torch.cat([compare_blocks(model, llm, text) for text in tokens if len(text) <= chunk - 16])
        values |= {"median_block": off.median().item(), "rounded_otherwise": (off > 1e-4).float().mean().item()}
    starts = [text[: 4 + 3 * place] for place, text in enumerate(tokens * 3)][:CONTINUED]
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    served = llm.generate(as_prompts(starts), greedy, use_tqdm=False)
    compared = [compare_continuation(model, text, output) for text, output in zip(starts, served, strict=True)]
    gaps = [gap for gap, _ in compared if gap is not None]
    values |= {"continued": len(starts), "equal": len(starts) - len(gaps), "largest_tie": max(gaps, default=0.0)}
    values["noise_equal"] = sum(is_stable for _, is_stable in compared)
    if perplexity:
        texts = {
            path.stem: [strip_start_token(row.tolist(), model) for row in load_windows(path).token_ids[:perplexity]]
            for path in windows
        }
        served = {name: score_served(llm, rows) for name, rows in texts.items()}
        values["perplexity_vllm"] = compute_perplexities(served)
        scored = {name: [score(model, text) for text in rows] for name, rows in texts.items()}
        values["perplexity_transformers"] = compute_perplexities(scored)
    return values


def set_up_vllm() -> None:
    """Set vLLM's environment, before it is imported: one process (errors show), unbound threads, a cache of 1 GiB."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def cut_texts(model: PreTrainedModel, windows: Sequence[Path], longest: int | None) -> list[list[int]]:
    """Return the token ids of 8 texts of different lengths, from the first file of windows, or at random."""
    lengths = [min(length, (longest or 512) - NEW_TOKENS - 8) for length in LENGTHS]
    if windows:
        rows = load_windows(windows[0]).token_ids
        cut = [rows[place % len(rows), 97 * place :][:length] for place, length in enumerate(lengths)]
    else:
        generator = torch.Generator().manual_seed(0)
        cut = [torch.randint(2, model.config.vocab_size, (length,), generator=generator) for length in lengths]
    return [strip_start_token(text.tolist(), model) for text in cut]


def as_prompts(texts: list[list[int]]) -> list[dict[str, list[int]]]:
    """Return texts in the form that vLLM takes token ids in."""
    return [{"prompt_token_ids": text} for text in texts]


def score(model: PreTrainedModel, text: list[int], noise: float = 0.0) -> torch.Tensor:
    """Return the log-probabilities of a text's tokens except the first, in transformers, with disturbed embeddings."""
    return compute_log_p(model, text, noise)[:-1].gather(1, torch.tensor(text)[1:, None]).squeeze(1)


@torch.no_grad()
def compute_log_p(model: PreTrainedModel, text: list[int], noise: float = 0.0) -> torch.Tensor:
    """Return log-probabilities of every token after each position, [T, V], with embeddings disturbed by `noise`."""
    ids = torch.tensor([text])
    embedded = model.get_input_embeddings()(ids)
    generator = torch.Generator().manual_seed(0)
    embedded = embedded * (1 + noise * torch.randn(embedded.shape, generator=generator)).to(embedded.dtype)
    return model(inputs_embeds=embedded).logits[0].float().log_softmax(-1)


@torch.no_grad()
def compare_blocks(model: PreTrainedModel, llm: Any, text: list[int]) -> torch.Tensor:
    """Return the relative distance of vLLM's outputs from transformers' outputs for vLLM's inputs, [blocks * T]."""
    from vllm import SamplingParams

    recorded: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch_(served: Any) -> None:
        def keep_input(layer: Any, args: tuple) -> None:
            inputs.append(args[1].clone() if args[2] is None else args[1] + args[2])  # vLLM changes them in place

        def keep_output(layer: Any, args: tuple, output: tuple) -> None:
            recorded.append((inputs.pop(), output[0] + output[1]))

        inputs: list[torch.Tensor] = []
        for layer in served.model.layers:
            handles.append(layer.register_forward_pre_hook(keep_input))
            handles.append(layer.register_forward_hook(keep_output))

    handles: list[Any] = []
    llm.apply_model(watch_)
    llm.reset_prefix_cache()
    llm.generate(as_prompts([text]), SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    for handle in handles:
        handle.remove()
    prefix = 0 if model.prefix_kv is None else model.prefix_kv.shape[-2]
    handles = []
    outputs: list[torch.Tensor] = []
    for block, (before, _) in zip(model.model.layers, recorded, strict=True):

        def replace(block: Any, args: tuple, kwargs: dict, states: torch.Tensor = before[prefix:]) -> tuple:
            return (states[None], *args[1:]), kwargs

        handles.append(block.register_forward_pre_hook(replace, with_kwargs=True))
        handles.append(block.register_forward_hook(lambda block, args, output: outputs.append(output)))
    model(torch.tensor([text]))
    for handle in handles:
        handle.remove()
    compared = []
    for output, (_, served) in zip(outputs, recorded, strict=True):
        reference = output[0] if output.dim() == 3 else output
        compared.append((reference - served[prefix:]).norm(dim=-1) / reference.norm(dim=-1))
    return torch.cat(compared)


def score_served(llm: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    """Return the same as `score` in vLLM, for several texts at once. vLLM counts placeholders as part of the prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    scores = []
    for text, output in zip(texts, llm.generate(as_prompts(texts), sampling, use_tqdm=False), strict=True):
        assert output.prompt_token_ids[-len(text) :] == text
        pairs = zip(text[1:], output.prompt_logprobs[-len(text) :][1:], strict=True)
        scores.append(torch.tensor([choices[token].logprob for token, choices in pairs]))
    return scores


def compute_perplexities(scores: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Return the perplexity of each file's texts, and of the texts of all files."""
    together = {"all": [score for texts in scores.values() for score in texts]} if len(scores) > 1 else {}
    return {name: compute_perplexity(texts) for name, texts in (scores | together).items()}


def compute_perplexity(scores: list[torch.Tensor]) -> float:
    """Return the perplexity of texts of equal length."""
    return torch.stack([-score.mean() for score in scores]).mean().exp().item()


def compare_continuation(model: PreTrainedModel, text: list[int], output: Any) -> tuple[float | None, bool]:
    """Compare a continuation of vLLM with the choices of transformers on the same text.

    Returns:
        At the first different token: how much likelier, in nats, transformers' choice is in transformers; None if all
        are equal. And whether a disturbance of the embeddings by 1e-6 changes no choice of transformers.
    """
    continuation = list(output.outputs[0].token_ids)
    read = text + continuation[:-1]
    log_p, disturbed = (compute_log_p(model, read, noise)[len(text) - 1 :] for noise in (0.0, 1e-6))
    best = log_p.argmax(-1)
    is_stable = torch.equal(best, disturbed.argmax(-1))
    for place, (chosen, served) in enumerate(zip(best.tolist(), continuation, strict=True)):
        if chosen != served:
            return (log_p[place, chosen] - log_p[place, served]).item(), is_stable
    return None, is_stable


if __name__ == "__main__":
    run_main(main)
