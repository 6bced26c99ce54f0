"""The frame of every run: errors, artifacts, progress, ranks, streams, memory, the params of a machine, and the sources
that params.yaml names.

Nothing here computes a result, so the fingerprints of `code.py` leave this room out. Whoever changes the layout of an
artifact raises `artifacts.FORMAT_VERSION`. Read `artifacts.py` first. May import from: none.

`params.py` is tested in tests/test_params.py, the other modules in the test file of their name.
"""
