"""The Triton backend: JIT code, its launcher, and the table of tiles."""
