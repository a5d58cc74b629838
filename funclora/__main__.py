"""`python -m funclora`, and under torchrun `-m funclora`: the command line."""

from funclora.cli import main

if __name__ == "__main__":
    main()
