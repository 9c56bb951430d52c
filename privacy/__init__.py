"""Privacy: what differential privacy means here - unit, clip, noise, accountant, ledger."""
