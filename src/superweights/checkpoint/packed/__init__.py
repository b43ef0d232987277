"""Matrices that other quantizers packed, back as numbers; one file per format, none needs the package that wrote it."""
