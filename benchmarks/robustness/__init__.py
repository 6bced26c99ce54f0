"""Random damage to everything that users hand in: `python -m benchmarks.robustness`.

`trials.py` runs mutations and judges them, `kinds.py` has one function per kind of input, `mutations.py` damages bytes,
values, folders and tensors, `bases.py` makes the undamaged inputs.
"""
