"""Controlled sentiment (Rafailov et al. 2023, section 6.1), on film reviews from a grammar."""
