"""The sparse CPU engine: networks whose time shrinks with their zeros."""
