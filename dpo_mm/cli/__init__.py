"""The command line: `dpo-mm` and its commands."""
