"""The deliverable: a folder with packed weights, scales and prefix.

Read `folder.py` first, which the stage `export` calls. May import from: runtime to inference.
"""
