"""Turns finished run folders into tables, claims, figures and one self-contained page."""
