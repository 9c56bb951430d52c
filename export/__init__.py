"""Export: global checkpoint to a deployable bundle."""
