"""A run: its folder and files, its manifest, its stages and their cache, its copies in a bucket."""
