"""Data that travels with the project: the embedded sample and the anatomy it is drawn with."""
