"""Diffusion mathematics: mask samplers, likelihood, advantages, surrogates, decoding. Needs torch alone."""
