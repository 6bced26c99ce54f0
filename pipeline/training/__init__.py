"""Training of a quantized model: where asked for, blocks one by one; all together, against the original.

Read `finetuning.py` first, what the stage of that name calls, then `trainer.py`. May import from: runtime to
quantization.
"""
