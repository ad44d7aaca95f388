"""`longrope`, and `python -m longrope`: the command line, or one line that says what it lacks."""

import sys


def main() -> None:
    """Run the command line; without the libraries of the pipeline extra, say so and exit with 2."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] in ("longrope", "longrope_kernels"):
            raise
        print(
            f"longrope: {missing.name}: got no such module, expected the pipeline extra: "
            "pip install 'longrope-kernels[pipeline]'",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
