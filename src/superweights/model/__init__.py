"""A transformers model: its structure, its weights on demand, and what a forward pass shows."""
