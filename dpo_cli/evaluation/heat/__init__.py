"""The token heat page: what policy and reference say of each token, as colour."""
