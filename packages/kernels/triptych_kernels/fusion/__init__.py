"""What `fuse` recognises inside a model, one kind of module per file; fuse.py is the way in.

Each file has `is_candidate(module)` and `recognise(module)`, which gives a Match or says why not.
"""
