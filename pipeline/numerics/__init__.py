"""Operations on one tensor, whatever model it belongs to: Hadamard transforms, quantizers, GPTQ, packing.

Read `quantizer.py` first: it teaches scales and zero points. May import from: runtime.

`formats.py` is tested in test_grids.py, the other modules in the test file of their name. test_torchao.py compares
quantizers with torchao's.
"""
