"""A/B comparison in one process: the same model with and without the patch, its text first, then its speed."""
