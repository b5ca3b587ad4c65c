"""Model families: each turns a configuration into a ``ModelSpec``."""
