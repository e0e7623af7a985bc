"""Weights between files and models: two-way rules, tensor files, shared component maps. Names and tensors only."""
