"""Measurements of what an engine gives: speed here, quality to come."""
