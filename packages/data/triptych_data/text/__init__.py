"""Chats to token ids and training targets: templates, turns, control tokens, tokenizers."""
