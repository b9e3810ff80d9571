"""Tables about loose images: device scores, and answers of a trained run."""
