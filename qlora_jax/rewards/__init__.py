"""Scores replies by functions of the user, which run in processes with limits (docs/rl.md)."""
