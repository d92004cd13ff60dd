"""Which tensors get which numbers: schemes, presets, recipes, plans. Data only, no tensors."""
