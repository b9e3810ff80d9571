"""The stages of flows/train, and the training of the screener."""
