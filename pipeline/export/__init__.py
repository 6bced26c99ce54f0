"""The exported folder: packed weights, scales and the prefix.

Read `folder.py` first, which the stage `export` calls. `params.py` is tested in tests/test_params.py.
May import from: runtime to inference.
"""
