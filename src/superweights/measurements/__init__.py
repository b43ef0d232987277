"""Numbers measured on a model, each with its unit, its interval and the digest of its data."""
