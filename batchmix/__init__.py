"""Offline batch generation for Mixtral: prompts in, Arrow files out."""

__version__ = "0.1.0"
