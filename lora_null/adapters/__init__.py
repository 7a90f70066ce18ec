"""Trained adapters as files: the plain form, merging, other formats, inspection."""
