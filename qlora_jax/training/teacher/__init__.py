"""The teacher of a run that distills: its predictions, from a model in memory or from files."""
