"""The command `prefixquant`: quantize a model, use it, measure it.

    prefixquant quantize MODEL --out DIR      # write a quantized model
    prefixquant generate DIR "Once upon a time"

This module imports only fast modules, so that `prefixquant --help` answers at once. A subcommand imports what it
needs. `prefixquant SUBCOMMAND --help` lists its arguments.
"""

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.runtime.arguments import ArgumentError
from pipeline.runtime.errors import run_main
from pipeline.version import VERSION


@dataclass(frozen=True)
class Subcommand:
    """A subcommand: a line of help, and the function that runs it on `sys.argv`."""

    help: str
    run: Callable[[], None]


def run_quantize() -> None:
    from prefixquant.quantize_command import main

    main()


def run_plan() -> None:
    from prefixquant.plan import main

    main()


def run_report() -> None:
    from prefixquant.report import main

    main()


def run_compare() -> None:
    from prefixquant.compare import main

    main()


def run_generate() -> None:
    from pipeline.inference.generation import main

    main()


def run_chat() -> None:
    from pipeline.inference.generation import main

    main(takes_turns=True)


def run_evaluate() -> None:
    from pipeline.evaluation.texts import main

    main()


def run_lm_eval() -> None:
    from pipeline.evaluation.harness import run_command_line

    run_command_line()


def run_onnx_generate() -> None:
    from pipeline.interop.onnx_command import main

    main()


def run_explain() -> None:
    from pipeline.explain import main

    main()


SUBCOMMANDS = {
    "quantize": Subcommand("quantize a model: a folder, a .gguf file, a Hugging Face Hub id", run_quantize),
    "plan": Subcommand("say how much time, memory and disk `quantize` would need, stage by stage", run_plan),
    "generate": Subcommand("continue a text with a quantized model", run_generate),
    "chat": Subcommand("talk to a quantized model, by its chat template", run_chat),
    "evaluate": Subcommand("measure perplexity and tasks, also against the original model", run_evaluate),
    "report": Subcommand("print the path of the report of a run", run_report),
    "compare": Subcommand("compare runs: their results, and the settings in which they differ", run_compare),
    "explain": Subcommand("say whether a model can be quantized, and why not, without its weights", run_explain),
    "onnx-generate": Subcommand("continue a text with an exported ONNX folder, in ONNX Runtime", run_onnx_generate),
    "lm-eval": Subcommand("lm-eval's own command line, with the model type prefixquant", run_lm_eval),
}


def format_help() -> str:
    """Return the text of `prefixquant --help`."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {subcommand.help}" for name, subcommand in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: prefixquant SUBCOMMAND …",
            "",
            "Quantize a language model with PrefixQuant, use it, measure it.",
            "",
            *lines,
            "",
            "  --version  print the version",
            "",
            "prefixquant SUBCOMMAND --help lists the arguments of a subcommand.",
        ]
    )


def dispatch() -> None:
    """Run the subcommand that the command line names.

    Raises:
        ArgumentError: there is no such subcommand.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(format_help())
    elif name == "--version":
        print(f"prefixquant {VERSION}")
    elif name in SUBCOMMANDS:
        sys.argv[:2] = [f"prefixquant {name}"]
        SUBCOMMANDS[name].run()
    else:
        close = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Use one of {', '.join(SUBCOMMANDS)}."
        raise ArgumentError(f"{name!r}: unknown subcommand. {hint}")


def main() -> None:
    """Run the command line; an error that is not a bug becomes one message and exit code 1."""
    run_main(dispatch)


if __name__ == "__main__":
    main()
