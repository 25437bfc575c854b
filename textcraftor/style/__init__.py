"""Style control: blends of text encoders, drawn, saved and compared."""
