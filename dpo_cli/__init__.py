"""Direct Preference Optimization as an offline, versioned pipeline."""
