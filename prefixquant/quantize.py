"""Quantize a model: one command, which continues where it was stopped.

    prefixquant quantize MODEL --out DIR
    prefixquant quantize MODEL --out DIR --recipe w4a8kv4 --text my.txt --finetune none
    prefixquant quantize MODEL --out DIR --bits W4A4KV8 --set calibration.train.windows=64

MODEL is a folder with config.json and safetensors, a .gguf file, a Hugging Face Hub id or packaged:smollm2-135m. The
run lives in DIR.work, a DVC project. The same command continues it, and other settings reuse what they do not change.
"""

from pathlib import Path

from pipeline.runtime.arguments import Parser
from prefixquant.project import Request, run_request
from prefixquant.recipes import DEFAULT_RECIPE, FINETUNING, format_recipes, parse_setting


def make_parser(description: str | None) -> Parser:
    """Return a parser with the arguments that say how a model is quantized."""
    parser = Parser(description=description, epilog=f"recipes:\n{format_recipes()}")
    parser.add_argument("source", metavar="MODEL", help="the model to quantize")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, metavar="NAME", help=f"default: {DEFAULT_RECIPE}")
    parser.add_argument("--bits", metavar="W4A4KV4", help="bits of weights, activations, KV cache")
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="texts for calibration and evaluation; default: the packaged corpora",
    )
    parser.add_argument("--finetune", choices=FINETUNING, help="training: none, short (as by default), long (4x text)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="keys of params.yaml, with dots"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="the work folder; default: --out with .work added")
    return parser


def main() -> None:
    """Run `prefixquant quantize`."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the quantized model")
    parser.add_argument("--clean", action="store_true", help="remove the work folder at the end")
    arguments = parser.parse_args()
    out = run_request(
        Request(
            source=arguments.source,
            out=arguments.out,
            texts=tuple(arguments.text),
            recipe=arguments.recipe,
            bits=arguments.bits,
            finetune=arguments.finetune,
            settings=dict(map(parse_setting, arguments.set)),
            work=arguments.work,
            clean=arguments.clean,
        )
    )
    print(f'{out}: the quantized model. Try: prefixquant generate {out} "Once upon a time"')
