"""Commands of the command line `dpo-mm`."""
