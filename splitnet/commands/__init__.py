"""The commands of `splitnet` that need neither the planner nor a node."""
