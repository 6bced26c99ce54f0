from benchmarks.peers.comparison import main
from pipeline.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
