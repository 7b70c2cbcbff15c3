"""One command a file: options and what is printed; loaded when asked for."""
