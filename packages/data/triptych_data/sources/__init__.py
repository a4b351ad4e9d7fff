"""What `triptych-data shard` reads: one module per kind of input, each a `source.Source`."""
