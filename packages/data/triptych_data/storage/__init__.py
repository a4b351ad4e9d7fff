"""Where bytes lie: local files, and URLs read in blocks through a cache."""
