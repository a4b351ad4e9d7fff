"""Multimodal chats to indexed WebDataset shards, to packed batches that resume exactly."""
