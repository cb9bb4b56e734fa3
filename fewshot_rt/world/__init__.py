"""A procedural world: textured scenes with objects, camera and light, in which events happen."""

from .clips import VOCABULARY, Clips, make_clips
from .events import EVENTS

__all__ = ["EVENTS", "VOCABULARY", "Clips", "make_clips"]
