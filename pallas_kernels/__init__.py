"""4-bit weight formats and the matmuls that read them: raw arrays in, raw arrays out."""
