"""Rows and files: row schemas, prompts, questions, image files, loading pairs."""
