"""The report: one HTML page that shows what the stages left under reports/, offline, and its figures as files."""
