"""Judges by the rules of published benchmarks. Their questions are read by `dpo_mm.data.benchmarks`."""
