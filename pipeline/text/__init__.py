"""Text: the documents of corpora, and the token windows for calibration and evaluation.

Read `corpora.py` and `calibration.py` first, which the stages of these names call. May import from: runtime to
importing.

Tested elsewhere: `hub.py` in tests/text/test_corpora.py.
"""
