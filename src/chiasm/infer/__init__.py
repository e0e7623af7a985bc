"""Inference: conversations in, text out."""
