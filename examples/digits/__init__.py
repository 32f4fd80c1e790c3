"""A diffusion model of handwritten digits that needs no download: what `examples/ddpo.py` trains."""
