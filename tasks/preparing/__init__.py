"""The stages of flows/prepare, in its order: ingestion, quality, splitting, packing, screening."""
