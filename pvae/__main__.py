"""`python -m pvae`: the command line."""

from pvae.cli import main

if __name__ == "__main__":
    main()
