"""Finding the best decision for each kernel on this machine, and remembering it."""
