"""Sources of data: folders, archives, links, Dropbox, buckets."""
