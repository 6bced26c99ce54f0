"""Models that other programs wrote: opened, checked tensor by tensor, and written as plain checkpoints.

Read `import_model.py` first, which the stage `model` calls, then `source.py`: the interface that `folder_source.py` and
`gguf_source.py` implement. May import from: runtime to models.
"""
