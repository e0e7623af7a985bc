"""Connectors: from the encoders' widths to the language model's."""
