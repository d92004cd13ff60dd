"""What is written, and the proof that it is what was trained."""
