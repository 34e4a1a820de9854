"""`python -m prismprune`: the command line where the script is not on the path."""

from prismprune.cli import main

if __name__ == "__main__":
    main()
