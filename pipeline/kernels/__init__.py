"""Operators that run an exported model faster on a CPU than torch's own: products of integers, and fewer passes.

kernels.cpp holds the operators, and `compiler.py` compiles them. Where they cannot be compiled, each module here has a
replacement in torch. `served_product` calls vLLM's oneDNN kernel and is only for pipeline/serving.

Read `compiler.py` first, then `integer_product.py`. May import from: runtime to numerics. `operands.py` holds data
only, and is tested with the products.
"""
