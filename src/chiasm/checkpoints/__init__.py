"""Folders with models: our own, names of the hub, and the weights of single parts from either."""
