"""The bytes: how many there are and who holds them."""
