"""Language models, and what makes them easier to decode."""
