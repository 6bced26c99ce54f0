"""Quantize a model: one command, which continues where it was stopped.

    prefixquant quantize MODEL --out DIR
    prefixquant quantize MODEL --out DIR --recipe w4a8kv4 --text my.txt --finetune none
    prefixquant quantize MODEL --out DIR --bits W4A4KV8 --set calibration.train.windows=64

MODEL is a folder with config.json and safetensors, a .gguf file, a Hugging Face Hub id or packaged:smollm2-135m. The
run lives in DIR.work, a DVC project. The same command continues it, and other settings reuse unchanged results.
"""

import argparse
from pathlib import Path

from pipeline.runtime.arguments import Parser
from prefixquant.project import Request, run_request
from prefixquant.recipes import DEFAULT_RECIPE, FINETUNING, format_recipes, parse_setting


def make_parser(description: str | None, out: Path | None = None) -> Parser:
    """Return a parser with the arguments of `quantize`.

    Args:
        out: the default of `--out`; None where it must be named.
    """
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
    parser.add_argument(
        "--out", type=Path, required=out is None, default=out, metavar="DIR", help="the folder of the quantized model"
    )
    parser.add_argument("--clean", action="store_true", help="remove the work folder at the end")
    return parser


def read_request(arguments: argparse.Namespace) -> Request:
    """Return the request that parsed arguments ask for. Raise ArgumentError if a setting cannot be read."""
    return Request(
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


def main() -> None:
    """Run `prefixquant quantize`."""
    out = run_request(read_request(make_parser(__doc__).parse_args()))
    print(f'{out}: the quantized model. Try: prefixquant generate {out} "Once upon a time"')
