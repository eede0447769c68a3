"""All that knows Transformers: its layers, calls, caches, parallel styles, and which of its code was reviewed."""
