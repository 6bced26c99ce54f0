"""The model in formats of other programs: compressed-tensors, GGUF, a PEFT adapter.

Read `other_formats.py` first: it says how much each format can hold and which models are refused, and it calls the
writers `compressed_tensors.py` and `gguf_writer.py`. `compressed_tensors.py` is tested in test_other_formats.py and
test_number_formats.py. May import from: runtime to export.
"""
