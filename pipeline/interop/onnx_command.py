"""Continue a text with an exported ONNX folder, in ONNX Runtime on the CPU.

    prefixquant onnx-generate artifacts/export_formats/onnx "Once upon a time" --max-new-tokens 32

The most likely token is taken at every step. It needs the extra `onnx`.
"""

import importlib.util
from pathlib import Path

from transformers import AutoTokenizer

from pipeline.runtime.arguments import ArgumentError, Parser, text, whole


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder that export.formats: [onnx] wrote")
    parser.add_argument("prompt", type=text, help="text to continue")
    parser.add_argument("--max-new-tokens", type=whole(1), default=32)
    parser.add_argument("--threads", type=whole(1), help="default: ONNX Runtime's choice")
    arguments = parser.parse_args()
    if importlib.util.find_spec("onnxruntime") is None:
        raise ArgumentError(
            "onnxruntime is not installed. Install the extra: pip install 'prefixquant-pipeline[onnx]'."
        )
    from pipeline.interop.onnx_session import OnnxModel

    model = OnnxModel(arguments.folder, arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    token_ids: list[int] = tokenizer(arguments.prompt)["input_ids"]
    start = model.manifest["start_token_id"]
    if start is not None and token_ids[:1] == [start]:  # the prefix has it already
        token_ids = token_ids[1:]
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    print(tokenizer.decode(model.generate(token_ids, arguments.max_new_tokens, stops)))
