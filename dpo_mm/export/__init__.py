"""Export a finished run: as files of other programs, as a merged model, and to the hub."""
