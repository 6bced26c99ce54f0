"""What is done to one tensor, whatever model it is of: Hadamard transforms, quantizers, GPTQ's rounding, packing.

Read `quantizer.py` first: it teaches scales and zero points. May import from: runtime.
"""
