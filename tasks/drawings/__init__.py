"""Drawn chests and devices, for the sample, for training the screener, and for the audit."""
