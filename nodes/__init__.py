"""The node server: keeps shards, runs them, passes activations on. Started by `splitnet node`; `nodes.testing.LocalCluster` starts
several on this machine."""
