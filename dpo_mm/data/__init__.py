"""Row schemas, prompts, questions, image files, and loading of preference pairs."""
