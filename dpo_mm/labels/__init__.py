"""People's votes on pairs: the pairs to show, the store of votes, and what becomes of them."""
