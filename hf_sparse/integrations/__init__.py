"""Other people's training loops, driving the methods of this package."""
