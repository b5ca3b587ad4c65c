"""Where complete KV blocks go when memory has no room for them."""
