"""Choose every scale and round the weights, block by block, before any training.

Read `quantizer_init.py` first, which the stage of that name calls. For each block it measures and scales channels
(`sensitivity.py`, `equalization.py`), records statistics (`statistics.py`), searches scales (`scale_search.py`) and
rounds (`block_init.py`). `assembly.py` is tested by tests/quantization/test_quantizer_init.py and
tests/training/test_finetuning.py, `params.py` by tests/test_params.py. May import from: runtime to rotation.
"""
