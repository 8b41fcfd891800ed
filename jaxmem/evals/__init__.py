"""Measurements of trained models, and of what they are compared with."""
