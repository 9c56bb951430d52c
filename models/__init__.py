"""Models: BiomedCLIP, the per-specialty heads, and what of them trains."""
