"""Verifiable rewards, one a file, and the Ray workers that score with them."""
