"""The on-disk contracts between stages: files, their names, pictures, cards, sample sets."""
