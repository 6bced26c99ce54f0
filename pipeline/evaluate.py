"""`python -m pipeline.evaluate FOLDER --text FILE` evaluates an export on any text. See evaluation/texts.py."""

from pipeline.evaluation.texts import main
from pipeline.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
