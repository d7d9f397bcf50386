"""Where the parts run: reward workers, placement."""
