"""Guided decoding: what a regex, a JSON Schema or a list of choices allows, as tables over tokens. See docs/guided.md."""
