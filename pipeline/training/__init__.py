"""Training of a quantized model, block by block and end to end, and the training loop that prefixes share.

Read `finetuning.py` first, which the stage of that name calls, then `trainer.py`. `place.py` is tested in
tests/training/test_streamed.py, `params.py` in tests/test_params.py.
May import from: runtime to quantization.
"""
