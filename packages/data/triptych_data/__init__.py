"""Multimodal chats to indexed WebDataset shards, to packed batches that resume exactly; the triptych-data command. Knows no model."""
