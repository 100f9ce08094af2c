"""One file for each command: its configuration, and the function that reads as what the command does."""
