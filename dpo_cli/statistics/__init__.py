"""Numbers of samples: intervals, calibration, strengths, agreement; numpy alone."""
