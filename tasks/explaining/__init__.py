"""The stages of flows/explain that ask the network: LIME and the audit."""
