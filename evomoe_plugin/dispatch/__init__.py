"""Dispatch: which processes hold which experts, and rows on their way to them and back."""
