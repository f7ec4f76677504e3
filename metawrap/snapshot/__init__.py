"""State of modules, buffers and generators: read, compared, and put back."""
