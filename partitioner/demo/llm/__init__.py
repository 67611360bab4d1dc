"""`splitnet demo --llm`: a small language model, trained there and then, split over three nodes, writing."""
