"""Jobs: composition, the only folder that knows both sides of a federation."""
