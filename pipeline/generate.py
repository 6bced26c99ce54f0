"""`python -m pipeline.generate FOLDER PROMPT`: text from an exported folder. See export/generation.py."""

from pipeline.export.generation import main
from pipeline.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
