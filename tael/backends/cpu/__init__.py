"""The native kernels behind the Backend protocol."""
