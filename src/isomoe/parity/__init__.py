"""Parity: whether two servers, engines or layouts are the same model, and where they part."""
