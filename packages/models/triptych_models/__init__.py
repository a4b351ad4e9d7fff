"""Model families as packed-sequence modules with their loss inside; imports no torch itself."""
