"""Encoders: units of a medium in, feature vectors out."""
