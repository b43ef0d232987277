"""Exceptions to the structural rules: one row each, with its reason. Keep this file short."""

NOT_DOWN_PROJECTIONS: dict[str, str] = {
    "per_layer_projection": "Gemma 3n: adds a per-layer embedding to the stream; nothing of the feed-forward block fills it",
}
"""Module names that have a down projection's shape and are none."""

WHOLE_FLOAT32: dict[str, str] = {
    "jamba": "its Mamba mixers multiply by projection weights past the linear layers",
}
"""Model types whose code multiplies by 16-bit weights past the linear layers: all weights are widened when loaded."""
