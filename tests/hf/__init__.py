"""The callback for the stock Trainer."""
