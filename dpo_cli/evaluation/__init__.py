"""Floor 3: held-out figures, generations, win rates, KL and the report."""
