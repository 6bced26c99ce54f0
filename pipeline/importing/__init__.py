"""Models that other programs wrote: opened, checked tensor by tensor, and written as plain checkpoints.

Read `import_model.py` first, which the stage `model` calls. Then read `source.py`, the interface that
`folder_source.py` and `gguf_source.py` implement. May import from: runtime to models.

Tested elsewhere: `source.py`, `folder_source.py` and `rewriting.py` in tests/importing/test_import_model.py,
`gguf_file.py` in tests/importing/test_gguf_source.py.
"""
