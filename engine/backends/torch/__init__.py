"""Hugging Face models under the shared scheduler: paged cache, packed forwards, wall clock."""
