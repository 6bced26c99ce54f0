"""The model in the formats of other programs: compressed-tensors, GGUF, a PEFT adapter.

Read `other_formats.py` first: what each format can carry, what is refused, who writes it (`compressed_tensors.py`,
`gguf_writer.py`). May import from: runtime to export.
"""
