"""Measures what the package does: speed, parity and how good the answers are."""
