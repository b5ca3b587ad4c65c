"""Drafts: guesses of the next tokens from text that is already there, for one pass to verify."""
