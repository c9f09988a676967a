"""`python -m odjax_train` is the `odjax` command."""

from odjax_train.cli import main

if __name__ == "__main__":
    main()
