"""The stages of flows/prepare, in its order: ingestion, quality, packing, splitting, screening."""
