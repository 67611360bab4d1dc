"""The commands of `splitnet` that need neither the planner nor a node: deploy, doctor, run, status, unload."""
