"""`python -m pipeline.models.explain SOURCE` runs `python -m pipeline.explain SOURCE`.

The plan of memory needs rooms after this one, so this module starts the other command instead of importing it.
"""

import argparse
import os
import sys

if __name__ == "__main__":
    _, arguments = argparse.ArgumentParser(add_help=False).parse_known_args()
    os.execv(sys.executable, [sys.executable, "-m", "pipeline.explain", *arguments])
