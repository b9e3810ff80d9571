"""Report and model card, written from what lies in a run folder."""
