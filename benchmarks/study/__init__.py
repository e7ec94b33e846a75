"""The study that decides which routing system is worth using (README.md)."""
