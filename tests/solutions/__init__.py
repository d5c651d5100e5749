"""Solutions of the built-in tasks, each by a way of its own."""
