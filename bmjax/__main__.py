"""`python -m bmjax`."""

from bmjax.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
