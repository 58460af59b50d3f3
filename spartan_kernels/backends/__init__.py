"""How operators are computed. No backend imports another."""
