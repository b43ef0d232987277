"""Super weight candidates: from a trace, and from the literature. Imports torch only where a model is run."""
