"""Measurements of what an engine gives: its speed, and how well it uses its context."""
