"""Run the command line: `python -m dpo_mm` is the same as `dpo-mm`."""

from dpo_mm.cli.main import main

if __name__ == "__main__":
    main()
