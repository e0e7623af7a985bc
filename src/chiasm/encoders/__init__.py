"""Encoders: units of a medium in, feature vectors out."""

from chiasm.encoders import bert, efficientnet, hf, imagebind, naflex, resnet, text, vit

__all__ = ["bert", "efficientnet", "hf", "imagebind", "naflex", "resnet", "text", "vit"]
