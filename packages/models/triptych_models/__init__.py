"""Model families as packed-sequence nn.Modules with an exact loss: build, load, freeze, count FLOPs, export. Knows no training."""
