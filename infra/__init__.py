"""Setting up and maintaining servers, workers and run folders."""
