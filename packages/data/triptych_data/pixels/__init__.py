"""Images as such: cut out of shards at one size, with what is random of them, for autoencoders."""
