"""Perplexity of settings against full precision.

    python -m benchmarks.quality              bits and modes, single choices of the default, training
    python -m benchmarks.quality.formats      number formats, rotations, prefixes
    python -m benchmarks.quality.onnx         static quantization in ONNX Runtime, with and without prefix and rotation
    python -m benchmarks.quality.positions    a finished run on other text, by position
    python -m benchmarks.quality.prefixes     no prefix, the found one and the trained ones, over several seeds
    python -m benchmarks.quality.rounding     the error of GPTQ on the text of its Hessians and on other text
    python -m benchmarks.quality.search       the cost and error of choosing ranges
    python -m benchmarks.quality.sites        the cost of each kind of quantizer

Each program explains itself with `--help`.
"""
