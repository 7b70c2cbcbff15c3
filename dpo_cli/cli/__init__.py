"""Floor 5: the commands and what they print."""
