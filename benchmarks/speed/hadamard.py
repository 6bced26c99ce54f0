"""The time of a Hadamard transform, as a multiple of copying its input, for the widths of known models.

    python -m benchmarks.speed.hadamard                       # on the GPU if there is one
    python -m benchmarks.speed.hadamard --device cpu --dtype bfloat16

The column "product" is one product with the whole matrix, up to a width of 1,024. A transform should not be slower.
Times are the minimum of several rounds, with rows in turn. 2²² numbers are transformed.
"""

import math
import time
from collections.abc import Callable

import torch

from pipeline.numerics.hadamard import factor_hadamard, hadamard_matrix, hadamard_transform, list_matrix_orders
from pipeline.pictures.tables import format_markdown
from pipeline.runtime.arguments import Parser, device
from pipeline.runtime.errors import run_main

WIDTHS = {
    64: "a head",
    128: "a head of Llama's",
    576: "SmolLM2-135M, D",
    896: "Qwen2.5-0.5B, D",
    1024: "Qwen3-0.6B, D",
    1536: "SmolLM2-135M, F",
    2048: "Llama-3.2-1B, D",
    4096: "Llama-2-7B, D",
    4864: "Qwen2.5-0.5B, F",
    5120: "Llama-2-13B, D",
    8192: "Llama-3.2-1B, F",
    11008: "Llama-2-7B, F",
    14336: "Llama-3-8B, F",
    18944: "Qwen2.5-7B, F",
    28672: "Llama-3-70B, F",
}
NUMBERS, ROUNDS, LARGEST_PRODUCT = 2**22, 7, 1024


def main() -> None:
    parser = Parser(description=__doc__)
    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=device, default=best)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    lines = []
    for width, name in WIDTHS.items():
        x = torch.randn(NUMBERS // width, width, device=arguments.device, dtype=getattr(torch, arguments.dtype))
        runs: list[Callable[[], torch.Tensor]] = [x.clone, lambda x=x: hadamard_transform(x)]
        if width <= LARGEST_PRODUCT:
            matrix = hadamard_matrix(width).to(x)
            runs.append(lambda x=x, matrix=matrix: x @ matrix)
        copy, *times = measure(runs, arguments.device)
        orders = (paley * power for paley, power in list_matrix_orders(factor_hadamard(width), x.is_cuda))
        cells = [f"{seconds / copy:.1f}" for seconds in times] + [""] * (2 - len(times))
        lines.append([name, f"{width}", " · ".join(map(str, orders)), *cells])
    print(format_markdown(["width of", "", "matrices", "transform, in copies", "product"], lines, titles=1))


@torch.no_grad()
def measure(runs: list[Callable[[], torch.Tensor]], where: torch.device) -> list[float]:
    """Return the seconds of each run: the minimum of several rounds, after a first one that does not count."""

    def time_once(run: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        run()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return time.perf_counter() - start

    least = [math.inf] * len(runs)
    for count in range(ROUNDS + 1):
        for place, run in enumerate(runs):
            seconds = time_once(run)
            least[place] = min(least[place], seconds if count else math.inf)
    return least


if __name__ == "__main__":
    run_main(main)
