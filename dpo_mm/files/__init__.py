"""Files on disk: atomic writes, checksums, keys of stored work, and output folders that change only what is theirs."""
