"""Bookkeeping of KV blocks: no tensor, no kernel."""
