"""Output that people see: text for the terminal, progress bars, and HTML for notebooks."""
