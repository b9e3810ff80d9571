"""Other people's networks: how one is read, audited over the images of a run, and shown."""
