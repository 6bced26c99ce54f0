"""`python -m pipeline.generate FOLDER PROMPT` generates text with an exported folder. See inference/generation.py."""

from pipeline.inference.generation import main
from pipeline.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
