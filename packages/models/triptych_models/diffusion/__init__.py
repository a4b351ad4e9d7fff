"""Models that turn noise into data: SiT and Wan, their objective, their samplers, their weights."""
