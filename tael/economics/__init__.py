"""What requests cost: usage, rate cards, the ledger and the keys that it bills."""
