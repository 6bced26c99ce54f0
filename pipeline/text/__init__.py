"""Text: documents of a corpus, and the token windows that calibration and evaluation see.

Read `calibration.py` first; it and `corpora.py` are what the stages of these names call. May import from: runtime to
importing.
"""
