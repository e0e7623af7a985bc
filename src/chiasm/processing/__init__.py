"""From messages to tensors: front ends, templates, and the one renderer that training, eval, chat and serving share."""

from chiasm.processing import audio, image, jinja, messages, naflex, pair, proportional, template, video

__all__ = ["audio", "image", "jinja", "messages", "naflex", "pair", "proportional", "template", "video"]
