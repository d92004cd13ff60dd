"""Folders that this and older versions wrote, one for each format and target; `write.py` made them."""
