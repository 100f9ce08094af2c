"""Whole commands: what several stages have to be joined for. `cli` and `recipes` call it; no stage knows of it."""
