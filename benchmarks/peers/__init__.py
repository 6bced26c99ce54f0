"""This project and other tools on the same model, text, windows and machine.

    python -m benchmarks.peers

`comparison.py` makes an environment for each tool, runs one process for each row in it, and prints the table. A script
`quantize_with_TOOL.py` runs in the environment of its tool. `measure.py` measures every row with the same functions.
"""
