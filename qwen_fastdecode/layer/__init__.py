"""How a layer is patched: its plan, which calls are decode steps, the dispatcher, and putting it on a class."""
