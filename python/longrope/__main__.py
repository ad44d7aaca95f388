"""`python -m longrope` is the `longrope` command."""

from .cli import main

if __name__ == "__main__":
    main()
