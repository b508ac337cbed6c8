"""Infinite-width networks that learn features, and their finite twins."""
