"""The C++ handlers for CPUs: how they are built, and how XLA gets to know them."""
