"""What a server needs before the first run."""
