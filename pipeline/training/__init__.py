"""Training of a quantized model: blocks one by one against their own output, then all together against the original.

Read `finetuning.py` first, what the stage of that name calls, then `trainer.py`. May import from: runtime to
quantization.
"""
