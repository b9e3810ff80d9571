"""Drawn chests and devices: the sample, and what the screener learns from and the audit puts on."""
