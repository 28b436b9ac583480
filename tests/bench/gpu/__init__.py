"""Measurements on a GPU, one JSON file per part. See `python -m tests.bench.gpu --help`."""
