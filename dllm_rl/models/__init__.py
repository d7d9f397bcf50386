"""Model families on transformers' own modules."""
