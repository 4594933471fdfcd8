"""Which connections a network has, and how they change as it trains."""
