"""vLLM against transformers on one exported folder: log-probabilities, greedy continuations, perplexity.

    W=artifacts/calibration/evaluation
    python -m benchmarks.serving_parity artifacts/export --windows $W/*.safetensors --perplexity 4

To be run where vLLM is installed (`make serve-setup`; docs/serving.md). Both read the same 8 texts of different
lengths, all at once in vLLM, one by one in transformers (`pipeline.quantized_model.load`), and continue them greedily.
Where a continuation differs, what counts is how far apart transformers has the two tokens there: a tie, or not.

Both multiply integers, where settings allow it, by kernels of their own; `--arithmetic float` compares with what
`evaluation` computed.

Quantizers round: a value on the edge between two integers falls to either side by the last bit of a sum, the next block
sees the difference, and 30 blocks of 4 bits make a perturbation of 1e-6 as large as quantization itself. So beside the
log-probabilities stand `noise`, what they change by in transformers when its embeddings are disturbed by 1e-6,
`noise_equal`, at how many of the continued texts transformers would choose alike all along when so disturbed, and two
figures for which every block of transformers gets the very input that vLLM's had: `median_block`, the difference of a
token's output relative to its size, and `rounded_otherwise`, the share of outputs in which it is above 1e-4. They need
--eager: nobody sees what passes between compiled blocks.
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
    parser.add_argument("--eager", action="store_true", help="without compiling: starts in seconds, not minutes")
    arguments = parser.parse_args()
    if arguments.perplexity and not arguments.windows:
        parser.error("--perplexity needs --windows")
    print(json.dumps(compare(**vars(arguments))))


def compare(
    folder: Path,
    windows: Sequence[Path] = (),
    perplexity: int = 0,
    dtype: str = "float32",
    chunk: int = 96,
    max_model_len: int | None = None,
    eager: bool = False,
    arithmetic: Arithmetic = "integer",
) -> dict[str, Any]:
    """What `main` prints. `chunk`: tokens that vLLM reads at a time."""
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
    if eager and any(len(text) <= chunk - 16 for text in tokens):
        own = torch.cat([compare_blocks(model, llm, text) for text in tokens if len(text) <= chunk - 16])
        values |= {"median_block": own.median().item(), "rounded_otherwise": (own > 1e-4).float().mean().item()}
    starts = [text[: 4 + 3 * place] for place, text in enumerate(tokens * 3)][:CONTINUED]
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    served = llm.generate(as_prompts(starts), greedy, use_tqdm=False)
    found = [compare_continuation(model, text, one) for text, one in zip(starts, served, strict=True)]
    gaps = [gap for gap, _ in found if gap is not None]
    values |= {"continued": len(starts), "equal": len(starts) - len(gaps), "largest_tie": max(gaps, default=0.0)}
    values["noise_equal"] = sum(alike for _, alike in found)
    if perplexity:
        texts = {
            path.stem: [strip_start_token(row.tolist(), model) for row in load_windows(path).token_ids[:perplexity]]
            for path in windows
        }
        served = {name: score_served(llm, own) for name, own in texts.items()}
        values["perplexity_vllm"] = compute_perplexities(served)
        scored = {name: [score(model, text) for text in own] for name, own in texts.items()}
        values["perplexity_transformers"] = compute_perplexities(scored)
    return values


def set_up_vllm() -> None:
    """Before vLLM is imported: one process, so that what fails is seen, no thread bound to a core, a cache of 1 GiB."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def cut_texts(model: PreTrainedModel, windows: Sequence[Path], longest: int | None) -> list[list[int]]:
    """Token ids of 8 texts of different lengths, from the first file of windows."""
    lengths = [min(length, (longest or 512) - NEW_TOKENS - 8) for length in LENGTHS]
    if windows:
        rows = load_windows(windows[0]).token_ids
        cut = [rows[place % len(rows), 97 * place :][:length] for place, length in enumerate(lengths)]
    else:
        generator = torch.Generator().manual_seed(0)
        cut = [torch.randint(2, model.config.vocab_size, (length,), generator=generator) for length in lengths]
    return [strip_start_token(text.tolist(), model) for text in cut]


def as_prompts(texts: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": text} for text in texts]


def score(model: PreTrainedModel, text: list[int], noise: float = 0.0) -> torch.Tensor:
    """Log-probabilities of a text's tokens but the first, in transformers; its embeddings disturbed by `noise`."""
    return compute_log_p(model, text, noise)[:-1].gather(1, torch.tensor(text)[1:, None]).squeeze(1)


@torch.no_grad()
def compute_log_p(model: PreTrainedModel, text: list[int], noise: float = 0.0) -> torch.Tensor:
    """Of every token behind every one of `text`, [T, V]."""
    ids = torch.tensor([text])
    embedded = model.get_input_embeddings()(ids)
    generator = torch.Generator().manual_seed(0)
    embedded = embedded * (1 + noise * torch.randn(embedded.shape, generator=generator)).to(embedded.dtype)
    return model(inputs_embeds=embedded).logits[0].float().log_softmax(-1)


@torch.no_grad()
def compare_blocks(model: PreTrainedModel, llm: Any, text: list[int]) -> torch.Tensor:
    """[blocks * T]: how far vLLM's outputs are from transformers', both on vLLM's input, relative to their size."""
    from vllm import SamplingParams

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(own: Any) -> None:
        def keep_input(layer: Any, args: tuple) -> None:
            inputs.append(args[1].clone() if args[2] is None else args[1] + args[2])  # vLLM changes them in place

        def keep_output(layer: Any, args: tuple, output: tuple) -> None:
            seen.append((inputs.pop(), output[0] + output[1]))

        inputs: list[torch.Tensor] = []
        for layer in own.model.layers:
            handles.append(layer.register_forward_pre_hook(keep_input))
            handles.append(layer.register_forward_hook(keep_output))

    handles: list[Any] = []
    llm.apply_model(watch)
    llm.reset_prefix_cache()
    llm.generate(as_prompts([text]), SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    for handle in handles:
        handle.remove()
    prefix = 0 if model.prefix_kv is None else model.prefix_kv.shape[-2]
    handles = []
    found: list[torch.Tensor] = []
    for block, (before, _) in zip(model.model.layers, seen, strict=True):

        def replace(block: Any, args: tuple, kwargs: dict, own: torch.Tensor = before[prefix:]) -> tuple:
            return (own[None], *args[1:]), kwargs

        handles.append(block.register_forward_pre_hook(replace, with_kwargs=True))
        handles.append(block.register_forward_hook(lambda block, args, output: found.append(output)))
    model(torch.tensor([text]))
    for handle in handles:
        handle.remove()
    pairs = [(mine[0] if mine.dim() == 3 else mine, its[prefix:]) for mine, (_, its) in zip(found, seen, strict=True)]
    return torch.cat([(mine - its).norm(dim=-1) / mine.norm(dim=-1) for mine, its in pairs])


def score_served(llm: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    """The same in vLLM, of several texts at once; it counts placeholders as the prompt's."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    scores = []
    for text, output in zip(texts, llm.generate(as_prompts(texts), sampling, use_tqdm=False), strict=True):
        assert output.prompt_token_ids[-len(text) :] == text
        own = output.prompt_logprobs[-len(text) :]
        scores.append(torch.tensor([found[token].logprob for token, found in zip(text[1:], own[1:], strict=True)]))
    return scores


def compute_perplexities(scores: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Of each file's texts, and of those of all files."""
    together = {"all": [score for own in scores.values() for score in own]} if len(scores) > 1 else {}
    return {name: compute_perplexity(own) for name, own in (scores | together).items()}


def compute_perplexity(scores: list[torch.Tensor]) -> float:
    """Of texts that are equally long."""
    return torch.stack([-score.mean() for score in scores]).mean().exp().item()


def compare_continuation(model: PreTrainedModel, text: list[int], output: Any) -> tuple[float | None, bool]:
    """How much likelier, in nats, transformers has its own token than vLLM's where both part; None: they do not.

    And whether transformers would choose alike all along vLLM's text if its embeddings were disturbed by 1e-6.
    """
    made = list(output.outputs[0].token_ids)
    log_p, disturbed = (compute_log_p(model, text + made[:-1], noise)[len(text) - 1 :] for noise in (0.0, 1e-6))
    best = log_p.argmax(-1)
    alike = torch.equal(best, disturbed.argmax(-1))
    for place, (mine, its) in enumerate(zip(best.tolist(), made, strict=True)):
        if mine != its:
            return (log_p[place, mine] - log_p[place, its]).item(), alike
    return None, alike


if __name__ == "__main__":
    run_main(main)
