"""What tests of several packages share; the folder `tests` is on the path for them."""
