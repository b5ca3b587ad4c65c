"""The executable definition of every layer, in numpy and float32."""

from tael.backends.reference.backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
