"""`splitnet demo`: the whole loop on this machine, on real weights and real input."""
