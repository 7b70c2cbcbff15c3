"""From files in many formats to canonical tables and token ids. No torch."""
