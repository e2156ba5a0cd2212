"""Rollouts: replies that the model samples to prompts, and the rows that it trains on with them."""
