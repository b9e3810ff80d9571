"""Where data comes from: folders, archives, links, Dropbox, buckets."""
