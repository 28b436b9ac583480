"""`python -m dpo_mm` is `dpo-mm`."""

from dpo_mm.cli.main import main

main()
