"""The nouns that cross a task boundary: facts, classes, splits, reasons, and the two networks of a run."""

from typing import Any

MODEL, TWIN = "model", "unfiltered"

TITLES = {MODEL: "the model", TWIN: "its unscreened twin"}

Facts = dict[str, Any]
"""What a stage tells about itself: JSON, counts and short strings, never arrays."""

NORMAL, PNEUMONIA = 0, 1
CLASS_FOLDERS = {"NORMAL": NORMAL, "PNEUMONIA": PNEUMONIA}
CLASS_NAMES = {NORMAL: "normal", PNEUMONIA: "pneumonia"}
SPLITS = ("train", "val", "test")
SUBTYPES = ("normal", "bacteria", "virus", "unknown")

READ_DEVICE = "shows a medical device (reviewed)"
SCORED_DEVICE = "shows a medical device (screener)"
DOUBTFUL_DEVICE = "may show a medical device (screener)"
DEVICE_REASONS = (READ_DEVICE, SCORED_DEVICE, DOUBTFUL_DEVICE)
"""What ``excluded`` says of training images that screening took out."""
