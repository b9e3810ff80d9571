"""From a file to pixels, and back to pictures for people: the only preprocessing of the product."""
