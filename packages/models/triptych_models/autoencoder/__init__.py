"""Representation autoencoders: a frozen encoder of images, and the decoder that is learnt to it."""
