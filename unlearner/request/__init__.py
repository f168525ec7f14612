"""The rows of a forget request and what goes with them."""
