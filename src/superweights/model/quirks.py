"""Exceptions to the structural rules: one row each, with its reason. Keep this file short."""

NOT_DOWN_PROJECTIONS: dict[str, str] = {
    r"per_layer_projection$": "Gemma 3n: brings a per-layer embedding into the stream, beside the feed-forward block",
    r"laurel\.linear_right$": "Gemma 3n: second half of a low-rank residual branch",
    r"layernorm\.": "A.X-K2: a gate inside a norm",
    r"adapter_modules\.": "X-MOD: an adapter behind the feed-forward block",
}
"""Patterns of module names in a layer that have a down projection's shape and are none."""
