"""Rank of this process among others, and how it stops."""
