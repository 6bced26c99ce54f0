"""Time and memory, as ratios to something measured in the same run.

    python -m benchmarks.speed.stages        every walking stage, against a plain forward of the same tokens
    python -m benchmarks.speed.finetuning    an epoch of fine-tuning, against a plain forward and backward
    python -m benchmarks.speed.scaling       plans and peak memory of large models
    python -m benchmarks.speed.hadamard      Hadamard transforms, against copying
    python -m benchmarks.speed.inference     the exported model, against the original and in vLLM

Each program explains itself with `--help`.
"""
