"""What an exported model computes faster on a CPU than torch's operators do: integers, and few passes.

kernels.cpp holds the operators, compiler.py has them compiled; where they cannot be had, each module here says what
runs in their place. One of them, `served_product`, calls vLLM's oneDNN kernel and is for pipeline/serving alone. Any
room below may import from here.
"""
