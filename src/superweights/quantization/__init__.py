"""Quantization as pure functions of tensors: schemes, rounding, clipping, weights that are held out, packing, activations."""
