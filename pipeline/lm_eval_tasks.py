"""`python -m pipeline.lm_eval_tasks run --model prefixquant …` is lm-eval's command line. See evaluation/harness.py."""

from pipeline.evaluation.harness import run_command_line
from pipeline.runtime.errors import run_main

if __name__ == "__main__":
    run_main(run_command_line)
