"""`python -m prefixquant …` is the command `prefixquant …`."""

from prefixquant.command import main

if __name__ == "__main__":
    main()
