"""Few-shot tasks from before/after pictures with video diffusion models, answered in real time."""

__version__ = "0.1.0"
