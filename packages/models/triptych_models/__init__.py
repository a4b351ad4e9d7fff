"""Model families as packed-sequence modules with their loss inside. Importing this loads no torch."""
