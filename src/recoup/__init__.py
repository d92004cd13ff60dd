"""recoup recovers the quality that quantization costs."""
