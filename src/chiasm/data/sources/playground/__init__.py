"""An embedded, endless, seeded world of pictures with exact answers."""

from chiasm.data.sources.playground.source import (
    CAPTION_TASKS,
    LABEL_TASKS,
    QUESTION_TASKS,
    SCENE_AND_DIGIT_TASKS,
    TASKS,
    Playground,
    PlaygroundText,
)

__all__ = [
    "CAPTION_TASKS",
    "LABEL_TASKS",
    "QUESTION_TASKS",
    "SCENE_AND_DIGIT_TASKS",
    "TASKS",
    "Playground",
    "PlaygroundText",
]
