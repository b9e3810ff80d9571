"""A benchmark for a machine with an accelerator; pytest collects nothing here."""
