"""The trainer: one loop, one step for each framework."""
