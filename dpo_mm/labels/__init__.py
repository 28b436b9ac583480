"""Votes of people on image pairs: the pairs to show, the store of votes, ratings and exports."""
