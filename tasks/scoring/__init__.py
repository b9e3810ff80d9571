"""Tables about loose images: device scores, and scores by the network of a run."""
